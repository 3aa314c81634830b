"""All-to-all dispatch and combine on real ranks, against a plain loop over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.layout import Layout
from qwen3_dist.model.feed_forward import MoEFeedForward
from qwen3_dist.ops import slices
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.communicator import SingleCommunicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    DispatchedTokens,
    DispatchOptions,
    from_fp8,
    to_fp8,
)
from qwen3_dist.parallel.expert_exchange import uses_all_to_all
from qwen3_dist.parallel.send_plan import OverflowFlag
from qwen3_dist.settings import EngineConfig
from tests.batches import random_batch
from tests.checkpoints import DENSE, MOE
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


def placements(ep: int) -> list[ExpertPlacement]:
    """Without copies, with copies, and what another load makes of the same number of copies."""
    if ep == 1:
        return [ExpertPlacement.even(EXPERTS, 1)]
    hot = [100.0 if expert == 3 else 1.0 for expert in range(EXPERTS)]
    return [
        ExpertPlacement.even(EXPERTS, ep),
        ExpertPlacement.even(EXPERTS, ep, redundant=4),
        ExpertPlacement.balanced(hot, ep, redundant=4),
    ]


def check_dispatch(parallel: ParallelContext) -> None:
    rank = parallel.coords.rank
    routings: list[Routing] = [scattered, crowded, padding_only]
    for placement, by_capacity in product(placements(parallel.ep.size), (False, True)):
        hosted = placement.hosted[parallel.ep.rank]
        dispatcher = dispatcher_of(parallel, placement, all_fit if by_capacity else None)
        for routing in routings:
            for rows in (1, 5):
                x, (ids, weights) = tokens_of(rank, rows), routing(rank, rows)
                adapters = (1000 * x[:, 0]).long().abs() if routing is scattered else None
                received, handle = dispatcher.dispatch(x, ids, weights, 5, adapters)
                if adapters is None:
                    assert received.adapters is None
                else:  # each row brought its own; empty slots are 0
                    assert received.adapters is not None
                    assert received.adapters.equal((1000 * received.tokens[:, 0]).long().abs())
                # Each etp rank computes a share of the columns; together the shares make the expert.
                combined = dispatcher.combine(answers(received, hosted) / parallel.etp.size, handle)
                assert torch.allclose(combined, expected(x, ids, weights), atol=1e-5)
                if (
                    routing is crowded
                    and not by_capacity
                    and parallel.ep.size > 1
                    and placement == placements(parallel.ep.size)[0]
                ):
                    # Once to a rank, however many of its experts.
                    everybodys = rows * parallel.ep.size * parallel.etp.size
                    assert len(received.tokens) == (everybodys if set(hosted) & {0, 1, 2} else 0)


def all_fit(rows: int) -> int:
    return rows


def dispatcher_of(
    parallel: ParallelContext, placement: ExpertPlacement, capacity: Callable[[int], int] | None, **more: Any
) -> AllToAllDispatcher:
    return AllToAllDispatcher(parallel.ep, parallel.etp, placement, capacity=capacity, **more)


def check_fp8(parallel: ParallelContext) -> None:
    placement = ExpertPlacement.even(EXPERTS, parallel.ep.size)
    for capacity in (None, all_fit):
        dispatcher = dispatcher_of(parallel, placement, capacity, fp8=True)
        x, (ids, weights) = tokens_of(parallel.coords.rank, 5), scattered(parallel.coords.rank, 5)
        received, handle = dispatcher.dispatch(x, ids, weights, most_rows=5)
        combined = dispatcher.combine(answers(received, placement.hosted[parallel.ep.rank]), handle)
        rounded = from_fp8(*to_fp8(x), x.dtype)
        assert torch.allclose(combined, expected(rounded, ids, weights), atol=1e-5)
        assert not torch.allclose(combined, expected(x, ids, weights), atol=1e-5)


def check_overflow(parallel: ParallelContext) -> None:
    """Rank 0 alone has more rows for one rank than fit: every rank learns of it, once."""
    placement, flag = ExpertPlacement.even(EXPERTS, parallel.ep.size), OverflowFlag()
    rank, groups = parallel.coords.rank, (parallel.tp, parallel.dp)
    two_fit = dispatcher_of(parallel, placement, lambda rows: 2 * parallel.etp.size, overflow=flag)

    def combined(routing: Routing) -> tuple[Tensor, Tensor]:
        x, (ids, weights) = tokens_of(rank, 6), routing(rank, 6)
        if rank:
            ids[2:] = -1
        received, handle = two_fit.dispatch(x, ids, weights, most_rows=6)
        mine = answers(received, placement.hosted[parallel.ep.rank]) / parallel.etp.size
        return two_fit.combine(mine, handle), expected(x, ids, weights)

    combined(crowded)
    assert flag.reduce_and_clear(*groups).item() > 0
    assert flag.reduce_and_clear(*groups).item() == 0

    def few(rank: int, rows: int) -> tuple[Tensor, Tensor]:
        ids, weights = scattered(rank, rows)
        ids[2:] = -1
        return ids, weights

    got, wanted = combined(few)
    assert flag.reduce_and_clear(*groups).item() == 0
    assert torch.allclose(got, wanted, atol=1e-5)
    if parallel.etp.size == 1:  # ranks that fit theirs have right sums even then
        got, wanted = combined(crowded)
        flag.reduce_and_clear(*groups)
        assert torch.allclose(got, wanted, atol=1e-5) is (rank > 0)


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=2,dp=2,ep=4", "tp=4,ep=2", "dp=2,ep=2"])
def test_rows_beyond_the_capacity_are_flagged_on_every_rank(layout: str) -> None:
    run_ranks(check_overflow, layout)


def test_a_token_of_nan_stays_alone_in_an_exchange_by_capacity() -> None:
    run_ranks(check_nan, "tp=2,ep=2")


def check_nan(parallel: ParallelContext) -> None:
    placement = ExpertPlacement.even(EXPERTS, parallel.ep.size)
    dispatcher = dispatcher_of(parallel, placement, all_fit)
    x, (ids, weights) = tokens_of(parallel.coords.rank, 5), crowded(parallel.coords.rank, 5)
    x[0] = torch.nan
    received, handle = dispatcher.dispatch(x, ids, weights, most_rows=5)
    combined = dispatcher.combine(answers(received, placement.hosted[parallel.ep.rank]), handle)
    assert combined[0].isnan().all() and not combined[1:].isnan().any()


def check_all_gather(parallel: ParallelContext) -> None:
    for placement in placements(parallel.ep.size):
        dispatcher = AllGatherDispatcher(placement, parallel.ep.rank)
        for routing in (scattered, crowded):
            x, (ids, weights) = tokens_of(0, 5), routing(0, 5)
            mine = answers(dispatcher.select(x, ids, weights), placement.hosted[parallel.ep.rank])
            combined = parallel.tp.all_reduce(mine / parallel.etp.size)
            assert torch.allclose(combined, expected(x, ids, weights), atol=1e-5)


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=4,ep=2", "tp=2"])
def test_the_sum_of_what_ranks_make_of_all_tokens_is_the_weighted_sum_of_experts(layout: str) -> None:
    run_ranks(check_all_gather, layout)


@pytest.mark.parametrize(
    ("settings", "layout", "tokens", "wanted"),
    [
        ({}, "tp=4,ep=4", 1, False),
        ({}, "tp=4,ep=4", 8192, True),
        ({}, "tp=2,ep=2", 8192, False),
        ({"dispatch_dtype": "fp8"}, "tp=2,ep=2", 8192, True),  # which is less to send
        ({"dispatch_dtype": "fp8"}, "tp=2,ep=2", 1, False),
        ({"moe_dispatch": "all_to_all"}, "tp=2,ep=2", 1, True),
        ({"moe_dispatch": "all_gather"}, "tp=4,ep=4", 8192, False),
    ],
)
def test_large_steps_go_by_all_to_all_unless_the_setting_decides(
    settings: dict[str, str], layout: str, tokens: int, wanted: bool
) -> None:
    shape = ModelConfig.from_dict(
        {**DENSE, **MOE, "model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8}
    )
    chosen = EngineConfig(model="", **settings)  # type: ignore[arg-type]
    assert uses_all_to_all(chosen, Layout.parse(layout), shape, tokens, "cpu") is wanted


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=4,ep=4", "tp=4,ep=2", "tp=2", "tp=2,dp=2,ep=4"])
def test_combine_of_dispatch_is_the_weighted_sum_of_experts(layout: str) -> None:
    run_ranks(check_dispatch, layout)


def test_rows_that_travel_as_fp8_are_those_of_fp8() -> None:
    run_ranks(check_fp8, "tp=2,ep=2")


def test_fp8_keeps_three_bits_of_every_number_however_large_its_run() -> None:
    x = torch.randn(7, 300) * torch.logspace(-4, 4, 7)[:, None]
    x[3] = 0
    numbers, scales = to_fp8(x)
    assert numbers.dtype == torch.float8_e4m3fn and scales.shape == (7, 3)
    largest = scales.repeat_interleave(128, dim=1)[:, :300] * 448
    assert ((from_fp8(numbers, scales, torch.float32) - x).abs() <= x.abs() / 16 + largest / 2**15).all()


def check_overlap(parallel: ParallelContext) -> None:
    """Two halves of a step, the second on its way while the first one's experts compute."""
    placement = ExpertPlacement.even(EXPERTS, parallel.ep.size)
    dispatcher = AllToAllDispatcher(parallel.ep, parallel.etp, placement)
    x = tokens_of(parallel.coords.rank, 9)
    ids, weights = scattered(parallel.coords.rank, 9)
    halves = zip(*(each.tensor_split(2) for each in (x, ids, weights)), strict=True)
    sums = []
    for arriving in [dispatcher.start_dispatch(*half) for half in halves]:
        received, handle = arriving()
        sums.append(dispatcher.start_combine(answers(received, placement.hosted[parallel.ep.rank]), handle))
    combined = torch.cat([finish() for finish in sums])
    assert torch.allclose(combined, expected(x, ids, weights), atol=1e-5)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_halves_of_a_step_may_be_under_way_together(shared_memory: bool) -> None:
    run_ranks(check_overlap, "tp=2,ep=2", shared_memory=shared_memory)


def check_overlapping_layer(parallel: ParallelContext) -> None:
    """A whole MoE layer over gloo, whose collectives overlap, gives what it gives in one piece."""
    assert parallel.ep.overlaps
    config = ModelConfig.from_dict({**DENSE, **MOE, "model_type": "qwen3_moe"})
    torch.manual_seed(0)
    layers = []
    for overlap_from in (4, 1000):
        within = replace(parallel, dispatch=DispatchOptions(overlap_from=overlap_from))
        layer = MoEFeedForward(config, within, ExpertPlacement.even(8, parallel.ep.size), TorchOps())
        for parameter in layer.parameters():
            parameter.requires_grad_(False).normal_(0, 0.1)
        layers.append(layer)
    layers[1].load_state_dict(layers[0].state_dict())
    batch = replace(random_batch((9,), (9,), 4), token_ids=torch.arange(18), group_tokens=(18,))
    x = torch.randn(9, config.emb_dim, generator=torch.Generator().manual_seed(parallel.ep.rank))
    with torch.inference_mode():
        halves, whole = (layer.dispatched(x, range(9), batch) for layer in layers)
    torch.testing.assert_close(halves, whole, atol=1e-5, rtol=1e-5)


def test_a_layer_that_overlaps_its_halves_gives_what_it_gives_in_one() -> None:
    run_ranks(check_overlapping_layer, "tp=2,ep=2", shared_memory=False)


def check_slices(parallel: ParallelContext) -> None:
    """Tokens of dp groups gathered a few at a time; the second group has none in the last slices."""
    config = ModelConfig.from_dict({**DENSE, **MOE, "model_type": "qwen3_moe"})
    torch.manual_seed(0)
    layer = MoEFeedForward(config, parallel, ExpertPlacement.even(8, parallel.ep.size), TorchOps())
    for parameter in layer.parameters():
        parameter.requires_grad_(False).normal_(0, 0.1)
    of_groups = (9, 4)
    x = torch.randn(of_groups[parallel.coords.group], config.emb_dim)
    batch = replace(random_batch((9,), (9,), 4), token_ids=torch.arange(9), group_tokens=of_groups)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        whole = layer.gathered(x, layer, batch)
        patch.setattr(slices, "SLICE_PAIRS", 3 * 2 * config.num_experts_per_tok)
        gathered = []
        all_gather = parallel.dp.all_gather
        patch.setattr(parallel.dp, "all_gather", lambda x: (gathered.append(len(x)), all_gather(x))[1])
        sliced = layer.gathered(x, layer, batch)
    assert gathered == [3, 3, 3]
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=1e-5)


def test_tokens_gathered_in_slices_give_the_same_sums() -> None:
    run_ranks(check_slices, "dp=2,ep=2")


@pytest.mark.parametrize(("etp", "nccl", "allowed"), [(1, True, True), (2, True, False), (2, False, True)])
def test_halves_do_not_use_two_groups_of_nccl_at_once(etp: int, nccl: bool, allowed: bool) -> None:
    class Group(SingleCommunicator):
        overlaps = True
        excludes_others = nccl

    one, two = Group(), Group()
    one.size, two.size = 2, etp
    assert AllToAllDispatcher(one, two, ExpertPlacement.even(EXPERTS, 2)).overlaps is allowed
