"""Dispatches tokens to their experts and combines the results, by all-gather or by all-to-all.

All-gather, for few tokens: every rank sees all tokens, computes its own experts (and columns), and one reduction
adds up the partial results. Nothing waits for the host. All-to-all, for many tokens:

    x [N, D] ── all-gather over etp ── copy once per ep rank that hosts one of the token's experts
        ── all-to-all ──▶ experts (this rank's columns): weighted sum per received row ──▶
        all-to-all back ── sum per token ── reduce-scatter over etp

The number of rows for each rank is counted, or is a fixed capacity (`send_plan.py`). etp ranks hold other columns of
the same experts, so all of them get the token, and their partial results are added; with etp = 1 both etp steps are
skipped. A token is sent to a rank once, even if several of its experts are there.

Legend: T tokens of the step, N tokens of this rank, K experts per token, R rows received, D emb_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.parallel.communicator import Communicator
from qwen3_dist.parallel.send_plan import CountedRows, OverflowFlag, SendPlan, SlottedRows

FP8_BLOCK = 128  # numbers that share an fp8 scale


@dataclass(frozen=True)
class DispatchOptions:
    """Options of all-to-all dispatch."""

    fp8: bool = False  # rows are sent as fp8
    overlap_from: int = 1024  # from this number of tokens per rank on, two micro-batches overlap
    by_capacity: bool | None = None  # fixed capacity, without the host, instead of counts; None: on GPUs only


@dataclass(frozen=True)
class DispatchedTokens:
    """The rows that an ep rank received, with their routing."""

    tokens: Tensor  # [R, D]
    expert_ids: Tensor  # [R, K] int64, index of each expert in this rank's stacks; -1: on another rank
    weights: Tensor  # [R, K] fp32 routing weights
    adapters: Tensor | None = None  # [R] int64, the number of each row's adapter, from 1; 0 or None: none


class _Table:
    """A routing table [C, E], on the device of its last use. Row n of a batch uses table row n % C."""

    def __init__(self, rows: list[list[int]]) -> None:
        # Created on the CPU even if the model is built on the meta device. The last column is for the id -1.
        self.values = torch.tensor([[*row, -1] for row in rows], device="cpu")

    def __getitem__(self, expert_ids: Tensor) -> Tensor:
        """The value of each id [N, K], -1 where the id is -1."""
        if self.values.device != expert_ids.device:
            self.values = on_device(self.values, self.values.dtype, expert_ids.device)
        if len(self.values) == 1:
            return self.values[0][expert_ids]
        rows = torch.arange(len(expert_ids), device=expert_ids.device) % len(self.values)
        return self.values[rows[:, None], expert_ids]

    def replace(self, rows: list[list[int]]) -> None:
        """Overwrites the table with other values of the same shape."""
        self.values[:, :-1] = on_device(rows, torch.int64, self.values.device)


class AllGatherDispatcher:
    """Dispatch for ranks that all have all tokens already: each computes the tokens of its experts."""

    def __init__(self, placement: ExpertPlacement, ep_rank: int) -> None:
        self._ep_rank = ep_rank
        self._places = _Table(placement.places_on(ep_rank))

    @property
    def places(self) -> Tensor:
        """The routing table [C, E + 1]: the index of each expert in this rank's stacks, -1 if on another rank."""
        return self._places.values

    def set_placement(self, placement: ExpertPlacement) -> None:
        self._places.replace(placement.places_on(self._ep_rank))

    def select(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, adapters: Tensor | None = None
    ) -> DispatchedTokens:
        """x [T, D] with its routing [T, K] and `adapters` [T], equal on all ranks -> the input of this rank's
        experts."""
        return DispatchedTokens(x, self._places[expert_ids], weights, adapters)


class AllToAllDispatcher:
    """Sends each rank only the tokens of its experts. Keeps no state between steps."""

    def __init__(
        self,
        ep: Communicator,
        etp: Communicator,
        placement: ExpertPlacement,
        fp8: bool = False,
        capacity: Callable[[int], int] | None = None,
        overflow: OverflowFlag | None = None,
    ) -> None:
        """`capacity(rows)` is the number of rows that a rank can send to each ep rank, if no rank has more than `rows`
        rows; `overflow` is set if they do not fit. Without `capacity` rows are counted."""
        self._ep = ep
        self._etp = etp
        self._capacity, self._overflow = capacity, overflow or OverflowFlag()
        self._owners, self._places = _Table(placement.owners), _Table(placement.places)
        self._fp8 = fp8

    def set_placement(self, placement: ExpertPlacement) -> None:
        self._owners.replace(placement.owners)
        self._places.replace(placement.places)

    @property
    def overlaps(self) -> bool:
        """Whether a started dispatch proceeds while this rank computes and starts another dispatch."""
        return self._ep.overlaps and (self._etp.size == 1 or not self._ep.excludes_others)

    def dispatch(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        most_rows: int | None = None,
        adapters: Tensor | None = None,
    ) -> tuple[DispatchedTokens, SendPlan | None]:
        """Sends x [N, D] to the experts `expert_ids` [N, K] with routing `weights` [N, K]; an id of -1 is no expert.

        N must be equal on the ranks of an etp group; it may be 0. With a capacity, `most_rows` is the largest N of all
        ranks. Rows and routing are sent in one exchange.
        """
        return self.start_dispatch(x, expert_ids, weights, most_rows, adapters)()

    def combine(self, expert_out: Tensor, plan: SendPlan | None) -> Tensor:
        """Sends the experts' outputs [R, D] back to the ranks of their tokens and adds them in fp32 -> [N, D]."""
        return self.start_combine(expert_out, plan)()

    def start_dispatch(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        most_rows: int | None = None,
        adapters: Tensor | None = None,
    ) -> Callable[[], tuple[DispatchedTokens, SendPlan | None]]:
        """Starts `dispatch` and returns a function that waits for its result. `adapters` [N] int64, as in
        `DispatchedTokens`, travel with their rows; either all ranks give them or none does."""
        x, expert_ids, weights, adapters = self._gather_columns(x, expert_ids, weights, adapters)
        owners, places = self._owners[expert_ids], self._places[expert_ids]
        if self._ep.size == 1:
            everything = DispatchedTokens(x, places, weights, adapters), None
            return lambda: everything
        parts = [*(to_fp8(x) if self._fp8 else [x]), weights]
        parts += [] if adapters is None else [adapters[:, None].int()]
        rows = torch.cat([_bytes(part) for part in parts], dim=1)
        plan: SendPlan
        if self._capacity is None:
            plan = CountedRows(owners, self._ep.size)
        else:
            assert most_rows is not None
            capacity = self._capacity(most_rows * self._etp.size)
            plan = SlottedRows(owners, self._ep.size, capacity, self._overflow)
            # Empty slots are copies of an additional row that goes to no expert.
            rows = F.pad(rows, (0, 0, 0, 1))
            owners, places = (F.pad(part, (0, 0, 0, 1), value=-1) for part in (owners, places))
        sent = plan.sent_rows
        local_ids = places[sent].masked_fill(owners[sent] != plan.destinations[:, None], -1).int()
        arriving = plan.start(self._ep, torch.cat([rows[sent], _bytes(local_ids)], dim=1))
        parts.append(local_ids)

        def finish() -> tuple[DispatchedTokens, SendPlan | None]:
            pieces = arriving().split([_row_bytes(part) for part in parts], dim=1)
            *rows, local_ids = (
                piece.contiguous().view(part.dtype) for piece, part in zip(pieces, parts, strict=True)
            )
            arrived = None if adapters is None else rows.pop()[:, 0].long()
            tokens = from_fp8(rows[0], rows[1], x.dtype) if self._fp8 else rows[0]
            return DispatchedTokens(tokens, local_ids.long(), rows[-1], arrived), plan

        return finish

    def start_combine(self, expert_out: Tensor, plan: SendPlan | None) -> Callable[[], Tensor]:
        """Starts `combine` and returns a function that waits for its result."""
        if plan is None:
            return lambda: self._etp.reduce_scatter(expert_out)
        returning = plan.start_back(self._ep, expert_out)
        return lambda: self._etp.reduce_scatter(returning())

    def _gather_columns(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, adapters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self._etp.size == 1:
            return x, expert_ids, weights, adapters
        choices = expert_ids.shape[1]
        last = [] if adapters is None else [adapters[:, None].float()]
        routing = self._etp.all_gather(torch.cat([expert_ids.float(), weights, *last], dim=1))
        expert_ids, weights = routing[:, :choices].long(), routing[:, choices : 2 * choices].contiguous()
        adapters = None if adapters is None else routing[:, -1].long()
        return self._etp.all_gather(x), expert_ids, weights, adapters


def _bytes(x: Tensor) -> Tensor:
    """[M, n] -> [M, bytes of a row]."""
    if not len(x):  # whose strides torch does not view so
        return x.new_empty(0, _row_bytes(x), dtype=torch.uint8)
    return x.contiguous().view(torch.uint8)


def _row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Converts x [M, D] to e4m3 [M, D] with fp32 scales [M, ceil(D / FP8_BLOCK)], one for each FP8_BLOCK numbers.

    The largest number of a block becomes 448, e4m3's largest (as in DeepEP's fp8 dispatch).
    """
    rows, dim = x.shape
    blocks = -(-dim // FP8_BLOCK)
    runs = F.pad(x.float(), (0, blocks * FP8_BLOCK - dim)).view(rows, blocks, FP8_BLOCK)
    scales = runs.abs().amax(dim=-1).clamp_(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    numbers = (runs / scales[..., None]).flatten(1)[:, :dim].to(torch.float8_e4m3fn)
    return numbers, scales


def from_fp8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`, up to rounding."""
    wide = scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : numbers.shape[1]]
    return (numbers.float() * wide).to(dtype)
