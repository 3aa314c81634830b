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

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.layout import even_ranges
from qwen3_dist.parallel.communicator import Communicator

ALL_TO_ALL_FROM = 512  # tokens of a step


def uses_all_to_all(setting: str, tokens: int, ranks: int) -> bool:
    """Whether a step of so many tokens goes by all-to-all, under setting `moe_dispatch`."""
    if setting == "auto":
        return ranks > 1 and tokens >= ALL_TO_ALL_FROM
    return setting == "all_to_all"


@dataclass(frozen=True)
class ExpertPlacement:
    """Which ep rank hosts each expert, and where in that rank's stack it lies."""

    owner: tuple[int, ...]
    local_index: tuple[int, ...]

    @classmethod
    def even(cls, num_experts: int, ep: int) -> ExpertPlacement:
        """Consecutive runs of experts whose lengths differ by at most one."""
        runs = even_ranges(num_experts, ep)
        return cls(
            owner=tuple(rank for rank, run in enumerate(runs) for _ in run),
            local_index=tuple(local for run in runs for local in range(len(run))),
        )

    def experts_of(self, rank: int) -> tuple[int, ...]:
        return tuple(expert for expert, owner in enumerate(self.owner) if owner == rank)


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
    """A constant table on the device it was last used on."""

    def __init__(self, values: tuple[int, ...]) -> None:
        self.values = torch.tensor((*values, -1), device="cpu")  # also while a model is built on meta

    def __getitem__(self, expert_ids: Tensor) -> Tensor:
        """The value of each id, -1 where the id is -1."""
        if self.values.device != expert_ids.device:
            self.values = self.values.to(expert_ids.device)
        return self.values[expert_ids]


class AllGatherDispatcher:
    """Every rank has all tokens already, as tp ranks do, and takes those of its experts."""

    def __init__(self, placement: ExpertPlacement, ep_rank: int) -> None:
        pairs = zip(placement.owner, placement.local_index, strict=True)
        self._here = _Table(tuple(local if owner == ep_rank else -1 for owner, local in pairs))

    @property
    def here(self) -> Tensor:
        """[experts] place of each expert in this rank's stack, -1 for those elsewhere."""
        return self._here.values

    def select(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> DispatchedTokens:
        """x [T, D] with its routing [T, K], the same on every rank -> what this rank computes."""
        return DispatchedTokens(x, self._here[expert_ids], weights)


class AllToAllDispatcher:
    """Each rank sends every other only the tokens it needs. Holds no state of any step."""

    def __init__(self, ep: Communicator, etp: Communicator, placement: ExpertPlacement) -> None:
        self._ep = ep
        self._etp = etp
        self._owner, self._local_index = _Table(placement.owner), _Table(placement.local_index)

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """Sends x [N, D] to the experts [N, K] of its rows; an id of -1 goes nowhere.

        N must be equal on the ranks of one etp group, and may be 0 or differ on others.
        """
        x, expert_ids, weights = self._gather_columns(x, expert_ids, weights)
        if self._ep.size == 1:
            received = DispatchedTokens(x, expert_ids, weights)
            return received, DispatchHandle(None, [], [], x.shape[0])
        owners = self._owner[expert_ids]
        ranks = torch.arange(self._ep.size, device=x.device)
        wanted = (owners[None] == ranks[:, None, None]).any(dim=-1)  # [ep, N]
        destinations, sent_rows = wanted.nonzero(as_tuple=True)
        send_counts = wanted.sum(dim=1).tolist()
        rows, recv_counts = self._ep.all_to_all(x[sent_rows], send_counts)

        elsewhere = owners[sent_rows] != destinations[:, None]
        local_ids = self._local_index[expert_ids][sent_rows].masked_fill(elsewhere, -1)
        routing = torch.cat([local_ids.float(), weights[sent_rows]], dim=1)  # ids are exact below 2^24
        routing, _ = self._ep.all_to_all(routing, send_counts, recv_counts)
        local_ids, weights = routing.chunk(2, dim=1)
        received = DispatchedTokens(rows, local_ids.long(), weights.contiguous())
        return received, DispatchHandle(sent_rows, send_counts, recv_counts, x.shape[0])

    def combine(self, expert_out: Tensor, handle: DispatchHandle) -> Tensor:
        """Brings the received rows' sums [R, D] home and adds them up -> [N, D]. Sums are taken in fp32."""
        if handle.sent_rows is None:
            return self._etp.reduce_scatter(expert_out)
        returned, _ = self._ep.all_to_all(expert_out, handle.recv_counts, handle.send_counts)
        out = expert_out.new_zeros(handle.num_tokens, expert_out.shape[1], dtype=torch.float32)
        out.index_add_(0, handle.sent_rows, returned.float())
        return self._etp.reduce_scatter(out.to(expert_out.dtype))

    def _gather_columns(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._etp.size == 1:
            return x, expert_ids, weights
        routing = self._etp.all_gather(torch.cat([expert_ids.float(), weights], dim=1))
        expert_ids, weights = routing.chunk(2, dim=1)
        return self._etp.all_gather(x), expert_ids.long(), weights.contiguous()
