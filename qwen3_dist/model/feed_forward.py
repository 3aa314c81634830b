"""The dense SwiGLU feed-forward layer, and the MoE layer, whose experts are split over the ep and etp ranks.

Legend: T tokens of the dp group's step, N tokens that this rank owns, E experts, K experts per token, D emb_dim,
I hidden columns of this rank, n rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.layout import padded_range
from qwen3_dist.model.expert_lora import ExpertLowRank
from qwen3_dist.model.experts import Experts, ExpertShape
from qwen3_dist.model.linear import Linear, LinearGroup, RowParallel
from qwen3_dist.ops import slices
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import AllGatherDispatcher, AllToAllDispatcher, DispatchedTokens
from qwen3_dist.parallel.expert_exchange import capacity
from qwen3_dist.parallel.send_plan import OverflowFlag

# A norm and the layer after it: x [n, D], padding [n] and adapters -> [n, D]
Transform = Callable[[Tensor, Tensor | None, AdapterRows | None], Tensor]


class FeedForward(nn.Module):
    """`fc3(silu(fc1(x)) * fc2(x))` over this rank's hidden columns: a partial sum over tp, or in deterministic mode
    the whole."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        emb_dim, tp = config.emb_dim, parallel.tp
        _, columns = padded_range(config.hidden_dim, tp.size, tp.rank)
        self.fc1 = Linear(emb_dim, columns, False, ops)
        self.fc2 = Linear(emb_dim, columns, False, ops)
        self.fc3 = RowParallel(config.hidden_dim, emb_dim, False, ops, tp, parallel.deterministic)
        self.gate_up = LinearGroup(ops, self.fc1, self.fc2)

    def forward(self, x: Tensor, padding: Tensor | None, adapters: AdapterRows | None) -> Tensor:
        """x [T, D] -> partial or whole sum [T, D], with the adapters of the rows. `padding` is ignored."""
        gate, up = self.gate_up.products(x, adapters)
        return self.fc3(self._ops.swiglu(gate, up), adapters)


@dataclass(frozen=True)
class PreparedMove:
    """A new placement, with the weights of the n experts that this rank needs for it, on the model's device."""

    placement: ExpertPlacement
    places: Tensor  # [n] int64, their indices in the rank's stacks
    leaving: Tensor  # [n] int64, the experts that they replace
    converted: tuple[Tensor, ...]  # their weights, from `Experts.convert`
    low_rank: ExpertLowRank | None = None  # the adapters of all experts of this rank in the new placement

    @property
    def tensors(self) -> list[Tensor]:
        return [self.places, self.leaving, *self.converted]


class MoEFeedForward(nn.Module):
    """Routes each token to its top K experts on all ranks and adds up their outputs."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelContext,
        placement: ExpertPlacement,
        ops: Ops,
        overflow: OverflowFlag | None = None,
    ) -> None:
        """`overflow` is set if rows do not fit the capacity of an all-to-all."""
        super().__init__()
        self._ops = ops
        self.placement = placement
        self._ep_rank = parallel.ep.rank
        # [E] int64, rows that experts had computed when they left this rank; never on meta.
        self._former_rows = torch.zeros(config.num_experts, dtype=torch.int64, device="cpu")
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        fits = partial(capacity, parallel.layout, config) if parallel.dispatch.by_capacity else None
        self.all_to_all = AllToAllDispatcher(
            parallel.ep, parallel.etp, placement, parallel.dispatch.fp8, fits, overflow
        )
        self.all_gather = AllGatherDispatcher(placement, parallel.ep.rank)
        self._dp, self._etp = parallel.dp, parallel.etp
        self._tp_size = parallel.tp.size
        self._deterministic = parallel.deterministic
        self._overlap_from = parallel.dispatch.overlap_from
        # etp ranks exchange equal numbers of rows. If they are in several dp groups, which may have different numbers
        # of tokens, all pad to the largest.
        self._pads_to_largest = parallel.tp.size % parallel.etp.size != 0
        self.gate = Linear(config.emb_dim, config.num_experts, False, ops)
        shape = ExpertShape.of(config, parallel)
        self.experts = Experts(len(placement.hosted[parallel.ep.rank]), shape, ops)

    @property
    def hosted(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its stacks."""
        return self.placement.hosted[self._ep_rank]

    def hosted_in(self, placement: ExpertPlacement) -> tuple[int, ...]:
        """The experts of this rank in another placement."""
        return placement.hosted[self._ep_rank]

    def rows_by_expert(self) -> dict[int, int]:
        """Rows that this rank has computed for each expert that it hosts or has hosted."""
        rows = Counter({expert: count for expert, count in enumerate(self._former_rows.tolist()) if count})
        rows.update(dict(zip(self.hosted, self.experts.counts.tolist(), strict=True)))
        return rows

    def reset_counts(self) -> None:
        """Sets `rows_by_expert` to 0."""
        self.experts.counts.zero_()
        self._former_rows.zero_()

    def arrivals(self, placement: ExpertPlacement) -> dict[int, int]:
        """The experts that this rank must read for `placement`, by their index in its stacks."""
        there = zip(self.hosted, placement.hosted[self._ep_rank], strict=True)
        return {place: new for place, (old, new) in enumerate(there) if old != new}

    def prepare_move(self, placement: ExpertPlacement, stacks: tuple[Tensor, ...]) -> PreparedMove:
        """Prepares `move`. `stacks`, on the weights' device, are the `arrivals` in the checkpoint's layout, as
        `Experts.convert` takes them. Does not change this module, so steps may run meanwhile."""
        places = list(self.arrivals(placement))
        leaving = [self.hosted[place] for place in places]
        device = stacks[0].device
        return PreparedMove(
            placement,
            on_device(places, torch.int64, device),
            on_device(leaving, torch.int64, device),
            self.experts.convert(stacks) if places else (),
        )

    def move(self, prepared: PreparedMove) -> None:
        """Switches to the prepared placement and experts. The host does not wait for a GPU."""
        if prepared.converted:
            places = prepared.places
            self.experts.count_on(places.device)
            if self._former_rows.device != places.device:
                self._former_rows = on_device(self._former_rows, torch.int64, places.device)
            self._former_rows.index_add_(0, prepared.leaving, self.experts.counts[places])
            self.experts.replace(places, prepared.converted)
        self.placement = prepared.placement
        self.experts.low_rank = prepared.low_rank
        self.all_to_all.set_placement(prepared.placement)
        self.all_gather.set_placement(prepared.placement)

    @property
    def is_adapted(self) -> bool:
        """Whether adapters change this layer. Equal on all ranks, so that all exchange the same."""
        return self.gate.low_rank is not None or self.experts.low_rank is not None

    def gathered(self, x: Tensor, transform: Transform, batch: StepBatch) -> Tensor:
        """The layer by all-gather, for few tokens: x [T, D], equal on all tp ranks -> what `total` takes when it has
        been all-reduced over tp.

        `transform` is the norm before this layer and then `forward`. With several dp groups every rank gathers the
        tokens of all groups, whose numbers are in `batch`.
        """
        if self._dp.size == 1:
            return transform(x, batch.padding, batch.adapters if self.is_adapted else None)
        longest, groups = batch.largest_group, self._dp.size
        numbers = batch.adapter_of_row if batch.adapted and self.is_adapted else None
        length = min(longest, slices.rows_of_slice(self.num_experts_per_tok, groups))
        parts = []
        for begin in range(
            0, longest, length
        ):  # in slices, since tokens of all groups take dp times the memory
            end, padding = min(begin + length, longest), batch.padding
            if padding is not None:
                padding = padding.view(groups, longest)[:, begin:end].flatten()
            rows = batch.rows_of_groups(begin, end)
            some = None if numbers is None else numbers[begin:end]
            parts.append(self._gathered(x[begin:end], transform, end - begin, rows, padding, some))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gathered(
        self,
        x: Tensor,
        transform: Transform,
        length: int,
        rows: Tensor | None,
        padding: Tensor | None,
        numbers: Tensor | None,
    ) -> Tensor:
        """`gathered` for at most `length` tokens of each dp group. `rows` are the rows of tokens among the gathered
        [dp * length]; None if all groups have `length` tokens. `numbers` are those of the tokens' adapters."""
        more = length - len(x)
        everybody = self._dp.all_gather(F.pad(x, (0, 0, 0, more)))
        of_all = None if numbers is None else self._dp.all_gather(F.pad(numbers, (0, more)))
        if rows is None:
            return self._dp.reduce_scatter(transform(everybody, padding, self._adapter_rows(of_all)))
        of_rows = None if of_all is None else of_all[rows]
        answers = transform(everybody[rows], None, self._adapter_rows(of_rows))
        out = answers.new_zeros(len(everybody), answers.shape[1])
        out[rows] = answers
        return self._dp.reduce_scatter(out)[: len(x)]

    def _adapter_rows(self, numbers: Tensor | None) -> AdapterRows | None:
        """From the number of each row's adapter [n] on the device."""
        if numbers is None:
            return None
        return AdapterRows.of_all(numbers, 0 if self.gate.low_rank is None else self.gate.low_rank.count)

    def forward(self, x: Tensor, padding: Tensor | None, adapters: AdapterRows | None = None) -> Tensor:
        """x [n, D] -> the outputs of this rank's experts, as `_outputs`, with the adapters of the rows. Rows of
        `padding` [n] go to no expert."""
        expert_ids, weights = self.route(x, adapters)
        if padding is not None:
            expert_ids = expert_ids.masked_fill(padding[:, None], -1)
        numbers = None if adapters is None else adapters.by_row
        return self._outputs(self.all_gather.select(x, expert_ids, weights, numbers))

    def _outputs(self, received: DispatchedTokens) -> Tensor:
        """The sum over this rank's experts [R, D], or in deterministic mode each choice's output [R, K * D], 0 for
        experts of other ranks: then ranks only exchange outputs, and `total` adds them up in the order of choices."""
        return (
            self.experts.contributions(received, self._etp) if self._deterministic else self.experts(received)
        )

    def total(self, combined: Tensor) -> Tensor:
        """What all ranks' experts gave, combined -> the sum of each token [n, D]."""
        if not self._deterministic:
            return combined
        sums = combined.new_zeros(
            len(combined), combined.shape[1] // self.num_experts_per_tok, dtype=torch.float32
        )
        for choice in combined.chunk(self.num_experts_per_tok, dim=1):
            sums += choice
        return sums.to(combined.dtype)

    def dispatched(self, x: Tensor, own_rows: range, batch: StepBatch) -> Tensor:
        """The layer by all-to-all, for many tokens: this rank's tokens x [N, D] -> [N, D].

        The first rows of x are the rows `own_rows` of the dp group's tokens; the others are padding. With many tokens
        there are two micro-batches: one is sent while experts compute the other.
        """
        own, level = len(x), -(-batch.largest_group // self._tp_size)
        if self._pads_to_largest:
            x = F.pad(x, (0, 0, 0, level - own))
        numbers = None
        if batch.adapted and self.is_adapted:
            numbers = batch.adapter_of_row[own_rows.start : own_rows.stop]
            numbers = F.pad(numbers, (0, len(x) - len(numbers)))
        expert_ids, weights = self.route(x, self._adapter_rows(numbers))
        expert_ids[len(own_rows) :] = -1
        if batch.padding is not None:
            padding = batch.padding[own_rows.start : own_rows.stop, None]
            expert_ids[: len(own_rows)].masked_fill_(padding, -1)
        batches = 2 if self.all_to_all.overlaps and level >= self._overlap_from else 1
        some = [None] * batches if numbers is None else numbers.tensor_split(batches)
        routing = zip(expert_ids.tensor_split(batches), weights.tensor_split(batches), some, strict=True)
        sums, most_rows = [], -(-level // batches)
        started = [
            self.all_to_all.start_dispatch(part, its_ids, its_weights, most_rows, its_adapters)
            for part, (its_ids, its_weights, its_adapters) in zip(
                x.tensor_split(batches), routing, strict=True
            )
        ]
        for arriving in started:
            received, plan = arriving()
            sums.append(self.all_to_all.start_combine(self._outputs(received), plan))
        return self.total(torch.cat([finish() for finish in sums])[:own])

    def route(self, x: Tensor, adapters: AdapterRows | None = None) -> tuple[Tensor, Tensor]:
        """Expert ids int64 and weights fp32 [N, K] of the tokens x [N, D], with the adapters of the rows."""
        return self._ops.route(self.gate(x, adapters), self.num_experts_per_tok, self.norm_topk_prob)
