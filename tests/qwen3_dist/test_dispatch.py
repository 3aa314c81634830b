"""All-to-all dispatch and combine on real ranks, against a plain loop over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    DispatchedTokens,
    ExpertPlacement,
    uses_all_to_all,
)
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


def answers(received: DispatchedTokens, hosted: tuple[int, ...]) -> Tensor:
    """What a rank with the experts `hosted` makes of the rows it received."""
    here = torch.tensor([*hosted, -1])[received.expert_ids]
    return expected(received.tokens, here, received.weights)


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
            # Each etp rank computes a share of the columns; together the shares make the expert.
            combined = dispatcher.combine(answers(received, hosted) / parallel.etp.size, handle)
            assert torch.allclose(combined, expected(x, ids, weights), atol=1e-5)
            if routing is crowded and parallel.ep.size > 1:  # once to a rank, however many of its experts
                everybodys = rows * parallel.ep.size * parallel.etp.size
                assert len(received.tokens) == (everybodys if set(hosted) & {0, 1, 2} else 0)


def check_all_gather(parallel: ParallelContext) -> None:
    placement = ExpertPlacement.even(EXPERTS, parallel.ep.size)
    dispatcher = AllGatherDispatcher(placement, parallel.ep.rank)
    for routing in (scattered, crowded):
        x, (ids, weights) = tokens_of(0, 5), routing(0, 5)
        mine = answers(dispatcher.select(x, ids, weights), placement.experts_of(parallel.ep.rank))
        combined = parallel.tp.all_reduce(mine / parallel.etp.size)
        assert torch.allclose(combined, expected(x, ids, weights), atol=1e-5)


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=4,ep=2", "tp=2"])
def test_the_sum_of_what_ranks_make_of_all_tokens_is_the_weighted_sum_of_experts(layout: str) -> None:
    run_ranks(check_all_gather, layout)


@pytest.mark.parametrize(
    ("setting", "tokens", "ranks", "wanted"),
    [("auto", 1, 4, False), ("auto", 8192, 4, True), ("auto", 8192, 1, False), ("all_to_all", 1, 4, True)],
)
def test_large_steps_go_by_all_to_all_unless_the_setting_decides(
    setting: str, tokens: int, ranks: int, wanted: bool
) -> None:
    assert uses_all_to_all(setting, tokens, ranks) is wanted


def test_uneven_experts_are_placed_in_runs_that_differ_by_one() -> None:
    placement = ExpertPlacement.even(10, 4)
    assert placement.owner == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert placement.local_index == (0, 1, 0, 1, 2, 0, 1, 0, 1, 2)


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=4,ep=4", "tp=4,ep=2", "tp=2", "tp=2,dp=2,ep=4"])
def test_combine_of_dispatch_is_the_weighted_sum_of_experts(layout: str) -> None:
    run_ranks(check_dispatch, layout)
