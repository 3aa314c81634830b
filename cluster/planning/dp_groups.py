"""Steps that the dp groups of a replica take together: as long as that of the slowest, and with experts in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import ceil

from cluster.planning.cost_model import CostModel, StepLine, StepShape


@dataclass(frozen=True)
class GroupShapes:
    """A step of all dp groups: the work of the group with the most prompts, and the mean of all."""

    largest: StepShape
    mean: StepShape

    @classmethod
    def of(cls, total: StepShape, groups: int, drafted: int = 0, budget: int | None = None) -> GroupShapes:
        """`total` is the sum of all groups, of which each computes `budget` tokens at most. Decodes and prompts are
        spread evenly, and prompts are not split. `drafted` tokens more are computed for each decode."""
        prompts = max(1, total.num_samples - total.num_decodes)
        most = ceil(prompts / groups)
        share = most / prompts
        decodes, tokens = ceil(total.num_decodes / groups), total.prefill_tokens
        if budget is not None and tokens:
            share = min(share, max(0, budget - decodes) / tokens)
        rows, context = (1 + drafted) * decodes, total.decode_context_tokens / groups
        samples = rows + (most if tokens else 0)
        return cls(
            StepShape(rows, int(context), round(tokens * share), int(total.prefill_pairs * share), samples),
            StepShape(rows, int(context), ceil(tokens / groups), total.prefill_pairs // groups, samples),
        )

    @classmethod
    def average(cls, steps: Sequence[tuple[GroupShapes, float]]) -> GroupShapes:
        """The mean of steps with weights; of none, a step without work."""
        weight = sum(share for _, share in steps) or 1.0

        def mean(of: Callable[[GroupShapes], StepShape]) -> StepShape:
            sums = (
                sum(getattr(of(shapes), field.name) * share for shapes, share in steps)
                for field in fields(StepShape)
            )
            return StepShape(*(round(each / weight) for each in sums))

        return cls(mean(lambda shapes: shapes.largest), mean(lambda shapes: shapes.mean))

    def shared_seconds(self, model: CostModel) -> float:
        """How much less a step takes than if all groups were as the largest: the experts, which all groups share, get
        the tokens of all."""
        if model.layout.dp == 1 or not model.config.num_experts:
            return 0.0
        largest, mean = (model.step_parts(shape).get("experts", 0.0) for shape in (self.largest, self.mean))
        return max(0.0, largest - mean)


def step_seconds(
    model: CostModel, drafted: int = 0, budget: int | None = None
) -> Callable[[StepShape], float]:
    """Seconds of a step of all dp groups of a replica, of which `shape` is the sum, as `GroupShapes.of` spreads it."""
    remembered: dict[tuple[int, int, int], tuple[list[StepLine], float]] = {}
    groups = model.layout.dp

    def lines_of(decodes: int, tokens: int, samples: int) -> tuple[list[StepLine], float]:
        """The lines of the largest group, and its share of the prompts."""
        shapes = GroupShapes.of(StepShape(decodes, 0, tokens, 0, samples), groups, drafted, budget)
        largest = shapes.largest
        lines = model.step_lines(largest.num_decodes, largest.prefill_tokens, largest.num_samples)
        saved_s = shapes.shared_seconds(model) if tokens else 0.0
        lines = [line._replace(constant_s=line.constant_s - saved_s) for line in lines]
        return lines, largest.prefill_tokens / tokens if tokens else 0.0

    def seconds(shape: StepShape) -> float:
        key = shape.num_decodes, shape.prefill_tokens, shape.num_samples
        if key not in remembered:
            remembered[key] = lines_of(*key)
        lines, share = remembered[key]
        context, pairs = shape.decode_context_tokens / groups, shape.prefill_pairs * share
        return max([constant + context * a + pairs * b for constant, a, b in lines])

    return seconds
