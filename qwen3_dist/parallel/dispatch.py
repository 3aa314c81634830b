"""Tokens to their experts and back, in two ways.

All-gather, for few tokens: every rank sees all of them, computes its own experts (and columns), and what the
ranks got is added up by one reduction. Nothing waits for the host. All-to-all, for many:

    x [N, D] ── all-gather over etp ── copy once per ep rank that hosts one of the token's experts
        ── all-to-all ──▶ experts (this rank's columns): weighted sum per received row ──▶
        all-to-all back ── sum per token ── reduce-scatter over etp

The etp ranks hold other columns of the same experts, so all of them need the token and their partial
results add up; where etp is 1 both etp steps vanish. A token whose experts share a rank travels once.

Legend: T tokens of the step, N tokens of this rank, K experts per token, M rows sent, R rows received, D emb_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout, prefers_all_to_all
from qwen3_dist.parallel.communicator import Communicator
from qwen3_dist.parallel.expert_placement import ExpertPlacement
from qwen3_dist.settings import EngineConfig
from qwen3_dist.transfer import on_device

FP8_BLOCK = 128  # numbers that share a scale


def uses_all_to_all(settings: EngineConfig, layout: Layout, config: ModelConfig, tokens: int) -> bool:
    """Whether a step of so many tokens, of all dp groups together, goes by all-to-all."""
    if settings.moe_dispatch == "auto":
        return prefers_all_to_all(layout, config, tokens, settings.dispatch_dtype == "fp8")
    return settings.moe_dispatch == "all_to_all"


@dataclass(frozen=True)
class DispatchOptions:
    """How all-to-all works: with rows as fp8, and from how many tokens of a rank on in two overlapping halves."""

    fp8: bool = False
    overlap_from: int = 1024


@dataclass(frozen=True)
class DispatchedTokens:
    """What an ep rank received."""

    tokens: Tensor  # [R, D]
    expert_ids: Tensor  # [R, K] int64, place of each row's experts in this rank's stack; -1: elsewhere
    weights: Tensor  # [R, K] fp32 routing weights


@dataclass(frozen=True)
class DispatchHandle:
    """What `combine` needs to undo one `dispatch`; made once, used once, never changed."""

    sent_rows: Tensor | None  # [M] which (gathered) token each sent row is a copy of; None: nothing was sent
    send_counts: list[int]  # rows sent to each ep rank
    recv_counts: list[int]  # rows received from each ep rank
    num_tokens: int  # tokens after the etp all-gather


class _Table:
    """[C, E] constants on the device they were last used on: row n of a batch looks in table row n % C."""

    def __init__(self, rows: list[list[int]]) -> None:
        # On the CPU also while a model is built on meta. The last column answers the id -1.
        self.values = torch.tensor([[*row, -1] for row in rows], device="cpu")

    def __getitem__(self, expert_ids: Tensor) -> Tensor:
        """The value of each id [N, K], -1 where the id is -1."""
        if self.values.device != expert_ids.device:
            self.values = self.values.to(expert_ids.device)
        if len(self.values) == 1:
            return self.values[0][expert_ids]
        rows = torch.arange(len(expert_ids), device=expert_ids.device) % len(self.values)
        return self.values[rows[:, None], expert_ids]

    def replace(self, rows: list[list[int]]) -> None:
        """Other constants of the same shape, in the same place."""
        self.values[:, :-1] = on_device(rows, torch.int64, self.values.device)


class AllGatherDispatcher:
    """Every rank has all tokens already, as tp ranks do, and takes those of its experts."""

    def __init__(self, placement: ExpertPlacement, ep_rank: int) -> None:
        self._ep_rank = ep_rank
        self._here = _Table(placement.places_on(ep_rank))

    @property
    def here(self) -> Tensor:
        """[C, E + 1] place of each expert in this rank's stack, -1 for those elsewhere; by row of the batch."""
        return self._here.values

    def place(self, placement: ExpertPlacement) -> None:
        self._here.replace(placement.places_on(self._ep_rank))

    def select(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> DispatchedTokens:
        """x [T, D] with its routing [T, K], the same on every rank -> what this rank computes."""
        return DispatchedTokens(x, self._here[expert_ids], weights)


class AllToAllDispatcher:
    """Each rank sends every other only the tokens it needs. Holds no state of any step."""

    def __init__(
        self, ep: Communicator, etp: Communicator, placement: ExpertPlacement, fp8: bool = False
    ) -> None:
        self._ep = ep
        self._etp = etp
        self._owner, self._place = _Table(placement.owners), _Table(placement.places)
        self._fp8 = fp8

    def place(self, placement: ExpertPlacement) -> None:
        self._owner.replace(placement.owners)
        self._place.replace(placement.places)

    @property
    def overlaps(self) -> bool:
        """Whether what has been started may go on while this rank computes, and starts another dispatch."""
        return self._ep.overlaps and (self._etp.size == 1 or not self._ep.excludes_others)

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """Sends x [N, D] to the experts [N, K] of its rows; an id of -1 goes nowhere.

        N must be equal on the ranks of one etp group, and may be 0 or differ on others. Rows travel with
        their routing, in one exchange.
        """
        return self.start_dispatch(x, expert_ids, weights)()

    def combine(self, expert_out: Tensor, handle: DispatchHandle) -> Tensor:
        """Brings the received rows' sums [R, D] home and adds them up -> [N, D]. Sums are taken in fp32."""
        return self.start_combine(expert_out, handle)()

    def start_dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> Callable[[], tuple[DispatchedTokens, DispatchHandle]]:
        """`dispatch` in two halves: what this returns waits for the rows."""
        x, expert_ids, weights = self._gather_columns(x, expert_ids, weights)
        owners, places = self._owner[expert_ids], self._place[expert_ids]
        if self._ep.size == 1:
            everything = DispatchedTokens(x, places, weights), DispatchHandle(None, [], [], x.shape[0])
            return lambda: everything
        ranks = torch.arange(self._ep.size, device=x.device)
        wanted = (owners[None] == ranks[:, None, None]).any(dim=-1)  # [ep, N]
        destinations, sent_rows = wanted.nonzero(as_tuple=True)
        send_counts = wanted.sum(dim=1).tolist()
        elsewhere = owners[sent_rows] != destinations[:, None]
        local_ids = places[sent_rows].masked_fill(elsewhere, -1)
        rows = list(to_fp8(x[sent_rows])) if self._fp8 else [x[sent_rows]]
        parts = [*rows, local_ids.int(), weights[sent_rows]]
        arriving = self._ep.start_all_to_all(torch.cat([_bytes(p) for p in parts], dim=1), send_counts)

        def finish() -> tuple[DispatchedTokens, DispatchHandle]:
            received, recv_counts = arriving()
            pieces = received.split([_row_bytes(part) for part in parts], dim=1)
            *rows, local_ids, weights = (
                piece.contiguous().view(part.dtype) for piece, part in zip(pieces, parts, strict=True)
            )
            tokens = from_fp8(rows[0], rows[1], x.dtype) if self._fp8 else rows[0]
            handle = DispatchHandle(sent_rows, send_counts, recv_counts, x.shape[0])
            return DispatchedTokens(tokens, local_ids.long(), weights), handle

        return finish

    def start_combine(self, expert_out: Tensor, handle: DispatchHandle) -> Callable[[], Tensor]:
        """`combine` in two halves: what this returns waits for the sums."""
        if handle.sent_rows is None:
            return lambda: self._etp.reduce_scatter(expert_out)
        sent_rows = handle.sent_rows
        returning = self._ep.start_all_to_all(expert_out, handle.recv_counts, handle.send_counts)

        def finish() -> Tensor:
            returned, _ = returning()
            out = expert_out.new_zeros(handle.num_tokens, expert_out.shape[1], dtype=torch.float32)
            out.index_add_(0, sent_rows, returned.float())
            return self._etp.reduce_scatter(out.to(expert_out.dtype))

        return finish

    def _gather_columns(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._etp.size == 1:
            return x, expert_ids, weights
        routing = self._etp.all_gather(torch.cat([expert_ids.float(), weights], dim=1))
        expert_ids, weights = routing.chunk(2, dim=1)
        return self._etp.all_gather(x), expert_ids.long(), weights.contiguous()


def _bytes(x: Tensor) -> Tensor:
    """[M, n] -> [M, bytes of a row]."""
    return x.contiguous().view(torch.uint8)


def _row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers of x [M, D] and fp32 scales [M, ceil(D / FP8_BLOCK)], a scale for each run of FP8_BLOCK.

    The largest of a run becomes e4m3's largest, 448 (the form of DeepEP's fp8 dispatch).
    """
    rows, dim = x.shape
    blocks = -(-dim // FP8_BLOCK)
    runs = F.pad(x.float(), (0, blocks * FP8_BLOCK - dim)).view(rows, blocks, FP8_BLOCK)
    scales = runs.abs().amax(dim=-1).clamp_(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    numbers = (runs / scales[..., None]).view(rows, -1)[:, :dim].to(torch.float8_e4m3fn)
    return numbers, scales


def from_fp8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`, up to rounding."""
    wide = scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : numbers.shape[1]]
    return (numbers.float() * wide).to(dtype)
