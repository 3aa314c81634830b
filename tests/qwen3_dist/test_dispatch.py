"""All-to-all dispatch and combine on real ranks, against a plain loop over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen3_dist.parallel.communicator import SingleCommunicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import AllToAllDispatcher, ExpertPlacement
from tests.ranks import run_ranks

EXPERTS, DIM = 10, 8
Routing = Callable[[int, int], tuple[Tensor, Tensor]]


def tokens_of(rank: int, rows: int) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(rank))


def scattered(rank: int, rows: int) -> tuple[Tensor, Tensor]:
    """Random routing with one padding row (id -1) at the end."""
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(rows)])
    ids[-1] = -1
    return ids, torch.rand(rows, 3, generator=generator)


def crowded(rank: int, rows: int) -> tuple[Tensor, Tensor]:
    """Every token wants experts 0, 1 and 2: the ranks that host others receive nothing."""
    return torch.tensor([[0, 1, 2]]).repeat(rows, 1), torch.full((rows, 3), 0.25)


def padding_only(rank: int, rows: int) -> tuple[Tensor, Tensor]:
    """Only rank 0 has tokens at all: a step with fewer tokens than ranks."""
    ids, weights = scattered(rank, rows)
    return (ids, weights) if rank == 0 else (torch.full_like(ids, -1), weights)


def expert(number: int, x: Tensor) -> Tensor:
    """A stand-in for expert `number`: linear, so that expected values are easy to write down."""
    return x * (number + 1) + number


def expected(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for choice, number in enumerate(ids[row].tolist()):
            if number >= 0:
                out[row] += weights[row, choice] * expert(number, x[row])
    return out


def check_dispatch(parallel: ParallelContext) -> None:
    placement = ExpertPlacement.even(EXPERTS, parallel.ep.size)
    hosted = placement.experts_of(parallel.ep.rank)
    dispatcher = AllToAllDispatcher(parallel.ep, parallel.etp, placement)
    rank = parallel.coords.rank
    routings: list[Routing] = [scattered, crowded, padding_only]
    for routing in routings:
        for rows in (1, 5):
            x, (ids, weights) = tokens_of(rank, rows), routing(rank, rows)
            received, handle = dispatcher.dispatch(x, ids, weights)
            assert len(received.counts) == len(hosted)
            assert sum(received.counts) == len(received.tokens)
            parts = received.tokens.split(received.counts)
            # Each etp rank computes a share of the columns; together the shares make the expert.
            share = 1 / parallel.etp.size
            done = [share * expert(number, part) for number, part in zip(hosted, parts, strict=True)]
            combined = dispatcher.combine(torch.cat(done), handle)
            assert torch.allclose(combined, expected(x, ids, weights), atol=1e-5)
            if routing is crowded and not set(hosted) & {0, 1, 2}:
                assert received.counts == [0] * len(hosted)


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=4,ep=4", "tp=4,ep=2", "tp=2", "tp=2,dp=2,ep=4"])
def test_combine_of_dispatch_is_the_weighted_sum_of_experts(layout: str) -> None:
    run_ranks(check_dispatch, layout)


def test_a_token_whose_experts_share_a_rank_travels_once() -> None:
    alone = SingleCommunicator()
    dispatcher = AllToAllDispatcher(alone, alone, ExpertPlacement.even(4, 1))
    _, handle = dispatcher.dispatch(torch.ones(2, DIM), torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2))
    assert handle.send_counts == [2]
    assert handle.sent_rows.tolist() == [0, 1]


def test_dispatched_rows_are_sorted_by_expert() -> None:
    alone = SingleCommunicator()
    dispatcher = AllToAllDispatcher(alone, alone, ExpertPlacement.even(3, 1))
    x = torch.tensor([[0.0], [1.0], [2.0]])
    received, _ = dispatcher.dispatch(x, torch.tensor([[2, 0], [0, 1], [-1, -1]]), torch.ones(3, 2))
    assert received.counts == [2, 1, 1]
    assert received.tokens[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_uneven_experts_are_placed_in_runs_that_differ_by_one() -> None:
    placement = ExpertPlacement.even(10, 4)
    assert placement.owner == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert placement.local_index == (0, 1, 0, 1, 2, 0, 1, 0, 1, 2)
