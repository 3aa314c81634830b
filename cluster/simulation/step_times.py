"""Step times for the simulation: a table of decode steps in front of the cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.dp_groups import GroupShapes
from qwen3_dist.protocol.step_plan import StepPlan

_CELL_TOKENS = 32  # of context per sequence: a decode step's time is interpolated linearly within a cell


class StepCost(Protocol):
    """The part of `CostModel` that the simulation uses."""

    def step_seconds(self, shape: StepShape) -> float: ...


class DecodeLine(NamedTuple):
    """Decode steps of one batch size take `base + slope * context` seconds while `context` is below `end`."""

    base: float
    slope: float
    end: int

    def seconds(self, context_tokens: int) -> float:
        return self.base + self.slope * context_tokens


class StepTimes:
    """Step times from `cost`. Times of decode steps are interpolated between contexts that lie `_CELL_TOKENS` per
    sequence apart, so that most steps need no call of the model."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._lines: dict[tuple[int, int], DecodeLine] = {}

    def seconds(self, shape: StepShape) -> float:
        """Seconds of a step in which every dp group has this shape."""
        if shape.prefill_tokens or not shape.num_decodes:
            return self._cost.step_seconds(shape)
        context = shape.decode_context_tokens
        return self.decode_line(shape.num_decodes, context).seconds(context)

    def together(self, shapes: Sequence[StepShape], groups: int) -> float:
        """Seconds of a step of `groups` dp groups, of which those with work have `shapes`: that of the slowest group.

        `CostModel` assumes that all groups have the same shape. `GroupShapes` has what differs where prompts make them
        differ.
        """
        seconds = [self.seconds(shape) for shape in shapes]
        slowest = max(seconds)
        if groups == 1 or not isinstance(self._cost, CostModel) or not any(s.prefill_tokens for s in shapes):
            return slowest
        largest = shapes[seconds.index(slowest)]
        decodes = sum(shape.num_decodes for shape in shapes) / groups
        prompts = sum(shape.prefill_tokens for shape in shapes) / groups
        mean = StepShape(math.ceil(decodes), 0, math.ceil(prompts), 0, 0)
        return slowest - GroupShapes(largest, mean).shared_seconds(self._cost)

    def decode_line(self, num_decodes: int, context_tokens: int) -> DecodeLine:
        """The line for `num_decodes` sequences with `context_tokens` in total."""
        width = num_decodes * _CELL_TOKENS
        cell = context_tokens // width
        line = self._lines.get((num_decodes, cell))
        if line is None:
            start, end = cell * width, (cell + 1) * width
            low, high = (
                self._cost.step_seconds(StepShape(num_decodes, context, 0, 0, num_decodes))
                for context in (start, end)
            )
            slope = (high - low) / width
            line = self._lines[num_decodes, cell] = DecodeLine(low - slope * start, slope, end)
        return line


def shape_of(plan: StepPlan) -> StepShape:
    """The shape of a step plan. A sequence with one token counts as a decode, as on the ranks."""
    decodes = context = tokens = pairs = samples = 0
    for step in plan.sequences:
        count, start = len(step.token_ids), step.start
        if count == 1:
            decodes += 1
            context += start + 1
        else:
            tokens += count
            pairs += count * start + count * (count + 1) // 2
        samples += step.sample is not None
    return StepShape(decodes, context, tokens, pairs, samples)
