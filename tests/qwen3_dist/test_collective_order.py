"""The order of collectives is the same on all ranks of a group, whatever steps come."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from graphlib import CycleError
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.model.block import TransformerBlock
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel import expert_exchange
from qwen3_dist.parallel.dispatch import AllToAllDispatcher, DispatchOptions
from qwen3_dist.protocol.step_plan import PromptLogprobsSpec, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.settings import EngineConfig
from qwen3_dist.worker import runner
from qwen3_dist.worker.runner import ModelRunner
from tests.recording import Call, check_order, recorded

CONFIG = ModelConfig(
    vocab_size=99,
    emb_dim=32,
    n_heads=8,
    n_kv_groups=2,
    head_dim=4,
    n_layers=2,
    hidden_dim=16,
    num_experts=16,
    num_experts_per_tok=2,
    moe_hidden_dim=8,
)
LAYOUTS = [
    "tp=2,ep=2",
    "tp=4",
    "tp=4,ep=2",
    "dp=2",
    "dp=2,ep=2",
    "dp=4,ep=2",  # etp ranks of other dp groups
    "tp=2,dp=2,ep=2",
    "tp=2,dp=2,ep=4",
    "tp=4,dp=2,ep=4",
    "tp=2,dp=4,ep=8",
    "dp=8,ep=8",
    "tp=2,dp=2",
    "pp=2,tp=2,ep=2",
    "pp=2,dp=2,ep=2",
    "pp=2,tp=2,dp=2,ep=4",
    "pp=2,dp=4,ep=2",
]
STEPS = 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_step(draw: random.Random, groups: int, number: int) -> list[StepPlan]:
    """Prompts, ends and middles of them, decodes, guesses, prompts' log-probabilities, nothing at all: by dp group."""
    kinds = draw.choice(
        (("decode",), ("decode", "guesses"), ("decode", "prompt", "chunk", "scores"), ("chunk",))
    )

    def sequence(slot: int) -> SequenceStep:
        kind = draw.choice(kinds)
        tokens = 1 if kind == "decode" else draw.randrange(2, 4 if kind == "guesses" else 12)
        start = 0 if kind == "scores" else draw.randrange(1, 9)
        spec = None if kind == "chunk" else SampleSpec(0.0, 1.0, 0, 0, start + tokens, draw.choice((None, 2)))
        blocks = tuple(draw.randrange(64) for _ in range(-(-(start + tokens) // 4)))
        drafted = tokens - 1 if kind == "guesses" else 0
        scores = PromptLogprobsSpec(0, (1,) * (tokens - 1), 2) if kind == "scores" else None
        ids = tuple(draw.randrange(99) for _ in range(tokens))
        return SequenceStep(slot, slot, ids, start, blocks, spec, num_drafted=drafted, prompt_request=scores)

    parts = []
    for group in range(groups):
        count = draw.choice((0, 1, 2, 4)) if group else draw.randrange(1, 5)
        sequences = sorted((sequence(slot) for slot in range(count)), key=lambda each: len(each.token_ids))
        parts.append(tuple(sequences))
    draw.shuffle(parts)
    exact = draw.random() < 0.2
    return [plan._replace(exact=exact) for plan in StepPlan.for_groups(number, parts)]


def history(
    text: str,
    way: str = "auto",
    dispatch: DispatchOptions | None = None,
    nccl: bool = True,
    graphs: bool = True,
) -> dict[int, list[Call]]:
    """What each rank of a layout asks of its groups in the same random steps."""
    layout, dispatch = Layout.parse(text), dispatch or DispatchOptions(by_capacity=True)
    draw = random.Random(text + way)
    steps = [random_step(draw, layout.dp, number) for number in range(STEPS)]
    calls: dict[int, list[Call]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "can_capture", lambda _: graphs)
        # Of these few tokens too some steps go by all-to-all, with slots for fewer rows than there may be.
        patch.setattr(expert_exchange, "CPU_ALL_TO_ALL_FROM", 12)
        patch.setattr(expert_exchange, "_DEVIATIONS", 0)
        for rank in range(layout.world):
            torch.manual_seed(rank)
            parallel, record = recorded(layout, rank, dispatch, nccl)
            model = Qwen3Model(CONFIG, parallel, TorchOps()).eval().requires_grad_(False)
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
            settings = EngineConfig(
                model="", block_size=4, moe_dispatch=way, max_model_len=32, max_num_seqs=4
            )
            mine = ModelRunner(model, 64, settings, path=Path())
            for plans in steps:
                mine.launch(plans[parallel.coords.group])
            assert not record.underway
            calls[rank] = record.calls
    return calls


@pytest.mark.parametrize("text", LAYOUTS)
def test_all_ranks_of_a_group_make_the_same_calls_in_one_order(text: str) -> None:
    check_order(history(text))
    check_order(history(text, "all_gather", graphs=False))
    for by_capacity in (False, True):
        halves = DispatchOptions(by_capacity=by_capacity, overlap_from=2)
        check_order(history(text, "all_to_all", halves, graphs=by_capacity))
    check_order(
        history(text, "all_to_all", DispatchOptions(overlap_from=2, fp8=True), nccl=False, graphs=False)
    )


def test_steps_of_the_histories_go_both_ways() -> None:
    operations = {call.operation for call in history("tp=2,dp=2,ep=4")[0]}
    assert {
        "even all_to_all",
        "all_gather",
        "all_reduce",
        "reduce_scatter",
        "broadcast",
        "gather",
    } <= operations
    counted = history("dp=2,ep=2", "all_to_all", DispatchOptions(by_capacity=False))[0]
    assert {"all_to_all of counts", "all_to_all of any rows"} <= {call.operation for call in counted}


def idle_groups_skip(patch: pytest.MonkeyPatch) -> None:
    whole = TransformerBlock.feed_forward

    def skipping(self: TransformerBlock, x: Tensor, attended: Tensor, batch: StepBatch) -> Tensor:
        return whole(self, x, attended, batch) if len(x) else x

    patch.setattr(TransformerBlock, "feed_forward", skipping)


def the_way_is_chosen_by_own_tokens(patch: pytest.MonkeyPatch) -> None:
    chosen: Callable[[ModelRunner, int], bool] = ModelRunner._by_all_to_all

    def by_own_tokens(self: ModelRunner, batch: StepBatch, exact: bool) -> StepBatch:
        return replace(batch, all_to_all=chosen(self, 2 * len(batch.token_ids)))

    patch.setattr(ModelRunner, "_dispatched", by_own_tokens)


def slots_are_those_of_own_rows(patch: pytest.MonkeyPatch) -> None:
    start = AllToAllDispatcher.start_dispatch

    def by_own_rows(
        self: AllToAllDispatcher, x: Tensor, ids: Tensor, weights: Tensor, _: int, adapters: Tensor | None
    ) -> object:
        return start(self, x, ids, weights, len(x), adapters)

    patch.setattr(AllToAllDispatcher, "start_dispatch", by_own_rows)


def the_flag_is_added_up_where_there_are_tokens(patch: pytest.MonkeyPatch) -> None:
    may_overflow = ModelRunner._may_overflow
    patch.setattr(
        ModelRunner,
        "_may_overflow",
        lambda self, batch, exact: bool(len(batch.token_ids)) and may_overflow(self, batch, exact),
    )


@pytest.mark.parametrize(
    "fault",
    [
        idle_groups_skip,
        the_way_is_chosen_by_own_tokens,
        slots_are_those_of_own_rows,
        the_flag_is_added_up_where_there_are_tokens,
    ],
)
def test_a_rank_that_goes_its_own_way_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="call"):
        for way in ("auto", "all_to_all"):
            check_order(history("dp=4,ep=4", way, graphs=False))


def test_two_groups_of_nccl_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AllToAllDispatcher, "overlaps", True)
    halves = DispatchOptions(by_capacity=True, overlap_from=2)
    with pytest.raises(AssertionError, match="under way"):
        history("tp=4,ep=2", "all_to_all", halves, graphs=False)


def test_groups_that_wait_for_each_other_are_found() -> None:
    one, two = (Call(group, "barrier", (), torch.float32) for group in ((0, 1), (0, 1, 2)))
    check_order({0: [one, two], 1: [one, two], 2: [two]})
    with pytest.raises(CycleError):
        check_order({0: [one, two], 1: [two, one], 2: [two]})
