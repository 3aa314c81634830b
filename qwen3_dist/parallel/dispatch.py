"""Tokens to their experts and back, by all-to-all over the ep ranks.

    x [N, D] ── all-gather over etp ── copy once per ep rank that hosts one of the token's experts
        ── all-to-all ── rows sorted by local expert ──▶ experts (this rank's columns) ──▶
        weighted sum per received row ── all-to-all back ── sum per token ── reduce-scatter over etp

The etp ranks hold other columns of the same experts, so all of them need the token and their partial
results add up; where etp is 1 both etp steps vanish. A token whose experts share a rank travels once.

Legend: N tokens of this rank, K experts per token, M rows sent, R rows received, P = (row, expert)
pairs computed here, D emb_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.layout import even_ranges
from qwen3_dist.parallel.communicator import Communicator


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
    """What an ep rank received: rows [P, D] sorted by local expert, and how many each expert got."""

    tokens: Tensor
    counts: list[int]


@dataclass(frozen=True)
class DispatchHandle:
    """What `combine` needs to undo one `dispatch`; made once, used once, never changed."""

    sent_rows: Tensor  # [M] which (gathered) token each sent row is a copy of
    send_counts: list[int]  # rows sent to each ep rank
    recv_counts: list[int]  # rows received from each ep rank
    pair_rows: Tensor  # [P] which received row each computed row belongs to
    pair_weights: Tensor  # [P, 1] routing weight of that row's expert
    num_tokens: int  # tokens after the etp all-gather


class AllToAllDispatcher:
    """Each rank sends every other only the tokens it needs. Holds no state of any step."""

    def __init__(self, ep: Communicator, etp: Communicator, placement: ExpertPlacement) -> None:
        self._ep = ep
        self._etp = etp
        self._placement = placement
        self._num_local = len(placement.experts_of(ep.rank))

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> tuple[DispatchedTokens, DispatchHandle]:
        """Sends x [N, D] to the experts [N, K] of its rows; an id of -1 goes nowhere.

        N must be equal on the ranks of one etp group, and may be 0 or differ on others.
        """
        x, expert_ids, weights = self._gather_columns(x, expert_ids, weights)
        owners = self._lookup(self._placement.owner, expert_ids)
        ranks = torch.arange(self._ep.size, device=x.device)
        wanted = (owners[None] == ranks[:, None, None]).any(dim=-1)  # [ep, N]
        destinations, sent_rows = wanted.nonzero(as_tuple=True)
        send_counts = wanted.sum(dim=1).tolist()
        rows, recv_counts = self._ep.all_to_all(x[sent_rows], send_counts)

        elsewhere = owners[sent_rows] != destinations[:, None]
        local_ids = self._lookup(self._placement.local_index, expert_ids)[sent_rows].masked_fill(
            elsewhere, -1
        )
        routing = torch.cat(
            [local_ids.float(), weights[sent_rows].float()], dim=1
        )  # ids are exact below 2^24
        routing, _ = self._ep.all_to_all(routing, send_counts, recv_counts)
        local_ids, weights = routing.chunk(2, dim=1)

        pair_rows, choice = (local_ids >= 0).nonzero(as_tuple=True)
        pair_experts = local_ids[pair_rows, choice].long()
        order = pair_experts.argsort(stable=True)
        pair_rows, choice = pair_rows[order], choice[order]
        counts = torch.bincount(pair_experts, minlength=self._num_local).tolist()
        handle = DispatchHandle(
            sent_rows, send_counts, recv_counts, pair_rows, weights[pair_rows, choice, None], x.shape[0]
        )
        return DispatchedTokens(rows[pair_rows], counts), handle

    def combine(self, expert_out: Tensor, handle: DispatchHandle) -> Tensor:
        """Brings expert_out [P, D] home and adds it up, weighted -> [N, D]. Sums are taken in fp32."""
        dtype, dim = expert_out.dtype, expert_out.shape[1]
        summed = expert_out.new_zeros(sum(handle.recv_counts), dim, dtype=torch.float32)
        summed.index_add_(0, handle.pair_rows, expert_out.float() * handle.pair_weights)
        returned, _ = self._ep.all_to_all(summed.to(dtype), handle.recv_counts, handle.send_counts)
        out = expert_out.new_zeros(handle.num_tokens, dim, dtype=torch.float32)
        out.index_add_(0, handle.sent_rows, returned.float())
        return self._etp.reduce_scatter(out.to(dtype))

    def _gather_columns(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._etp.size == 1:
            return x, expert_ids, weights
        routing = self._etp.all_gather(torch.cat([expert_ids.float(), weights.float()], dim=1))
        expert_ids, weights = routing.chunk(2, dim=1)
        return self._etp.all_gather(x), expert_ids.long(), weights

    @staticmethod
    def _lookup(table: tuple[int, ...], expert_ids: Tensor) -> Tensor:
        """table[id] for each id, -1 where the id is -1."""
        padded = torch.tensor((*table, -1), device=expert_ids.device)
        return padded[expert_ids]
