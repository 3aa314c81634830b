"""What a GPU rank runs before it is ready, on CPU ranks: it meets every kind of step and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from triton.runtime.errors import OutOfResources

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError, ResourceError
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.settings import EngineConfig
from qwen3_dist.worker.runner import ModelRunner
from qwen3_dist.worker.warm_up import StepShapes, explained_failures, powers_of_2
from tests.checkpoints import DENSE, MOE
from tests.ranks import run_ranks

BLOCKS, SEQS = 12, 3
SHAPES = StepShapes(
    dp=2,
    max_num_seqs=5,
    max_tokens=37,
    max_model_len=20,
    block_size=4,
    vocab_size=9,
    spare_block=7,
    num_drafted=2,
)


def test_warm_up_steps_keep_to_the_limits_and_write_to_the_spare_block_alone() -> None:
    for plans in SHAPES.steps():
        assert len(plans) == SHAPES.dp
        for plan in plans:
            assert plan.num_tokens <= SHAPES.max_tokens
            slots = [part.slot for part in plan.sequences]
            assert sorted(set(slots)) == sorted(slots) and all(slot < SHAPES.max_num_seqs for slot in slots)
            lengths = [len(part.token_ids) for part in plan.sequences]
            assert lengths == sorted(lengths, key=lambda length: length > 1)  # single tokens come first
            for part in plan.sequences:
                end = part.start + len(part.token_ids)
                assert end <= SHAPES.max_model_len
                assert part.new_blocks == (SHAPES.spare_block,) * -(-end // SHAPES.block_size)


@pytest.mark.parametrize("steps", [SHAPES.steps(), SHAPES.repeated()], ids=["first_try", "repeated"])
def test_the_first_warm_up_step_is_the_largest_there_can_be(steps: Iterator[list[StepPlan]]) -> None:
    first = next(steps)[0]
    assert first.num_tokens == SHAPES.max_tokens
    assert len(first.sequences) == SHAPES.max_num_seqs
    assert all(part.sample is not None and part.sample.logprobs for part in first.sequences)


def test_repeated_steps_have_all_the_sizes_there_are_and_no_capacity() -> None:
    plans = [plan for plan, _ in SHAPES.repeated()]
    assert all(plan.exact for plan in plans)
    assert {plan.num_tokens for plan in plans if not plan.decodes_only} >= set(
        powers_of_2(SHAPES.max_tokens)
    ) - {1}
    assert {plan.num_tokens for plan in plans if plan.decodes_only} == set(powers_of_2(SHAPES.max_num_seqs))


def test_warm_up_has_prompts_mixed_steps_decodes_drafts_prompt_outputs_and_idle_groups() -> None:
    plans = [plans for plans in SHAPES.steps()]
    kinds = {
        (
            any(len(part.token_ids) == 1 for part in plan.sequences),
            any(len(part.token_ids) > 1 and not part.num_drafted for part in plan.sequences),
            any(part.num_drafted for part in plan.sequences),
            any(part.prompt_request is not None for part in plan.sequences),
        )
        for plan, _ in plans
    }
    assert {(True, False, False, False), (False, True, False, False), (True, True, False, False)} <= kinds
    assert {(False, False, True, False), (False, True, False, True)} <= kinds
    assert any(busy.sequences and not idle.sequences for busy, idle in plans)


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_sizes_are_the_powers_of_2_and_the_largest(largest: int, sizes: list[int]) -> None:
    assert powers_of_2(largest) == sizes


def runner_of(model: Qwen3Model) -> ModelRunner:
    config = EngineConfig(
        model="", block_size=4, max_model_len=16, max_num_batched_tokens=24, max_num_seqs=SEQS
    )
    runner = ModelRunner(model, BLOCKS, config, path=Path())
    runner._shapes = replace(runner._shapes, spare_block=BLOCKS - 1)  # a CPU rank has none beyond its own
    return runner


def served(runner: ModelRunner, dp: int) -> list[object]:
    """A prompt of each of two sequences, decodes of what was sampled, by a rank of any group."""
    spec = SampleSpec(0.9, 1.0, 0, 3, 1, 2)
    results = []
    for step, (tokens, start) in enumerate(
        [((5, 6, 7, 8, 9), 0), ((LAST_SAMPLED,), 5), ((LAST_SAMPLED,), 6)]
    ):
        parts = tuple(
            SequenceStep(10 + slot, slot, tokens, start, (2 * slot, 2 * slot + 1), spec) for slot in (0, 1)
        )
        plans = StepPlan.for_groups(step, [parts] * dp)
        results.append(runner.run(plans[0]))
    return results


def leaves_nothing_behind(parallel: ParallelContext) -> None:
    torch.manual_seed(parallel.coords.rank)
    config = ModelConfig.from_dict(
        {**DENSE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    )
    model = Qwen3Model(config, parallel, TorchOps()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.15)
    cold, warm = runner_of(model), runner_of(model)
    with torch.inference_mode():
        warm._run_every_kind_of_step()
    assert not any(count for layer in warm.expert_counts().values() for count in layer.values())
    assert not any(half[:-1].any() for layer in warm._cache for half in (layer.keys, layer.values))
    dp = parallel.layout.dp
    assert served(warm, dp) == served(cold, dp)
    if parallel.layout.world > 1:
        dist.barrier()  # a first stage has sent its last rows long before they are received


@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2", "pp=2"])
def test_warm_up_leaves_nothing_behind_on_ranks_of_a_layout(layout: str) -> None:
    run_ranks(leaves_nothing_behind, layout)


def test_warm_up_leaves_nothing_behind_on_one_rank() -> None:
    leaves_nothing_behind(ParallelContext.single())


def test_warm_up_does_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "launch", None)
    config = ModelConfig.from_dict({**DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    runner_of(Qwen3Model(config, ParallelContext.single(), TorchOps()).eval().requires_grad_(False)).warm_up()


def test_a_step_that_does_not_fit_says_what_to_lower() -> None:
    with (
        pytest.raises(
            ResourceError, match=r"37 tokens and 5 sequences .* lower gpu_memory_utilization, max_num_b"
        ),
        explained_failures(torch.device("cuda"), SHAPES),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_kernel_that_fails_on_a_ranks_own_shapes_is_told_with_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small card")
    with (
        pytest.raises(
            ResourceError, match="a small card does not run a Triton kernel .*: out of resource: shared"
        ),
        explained_failures(torch.device("cuda"), SHAPES),
    ):
        raise OutOfResources(120_000, 101_376, "shared memory")


@pytest.mark.parametrize(
    "error", [ConfigError("as it is"), RuntimeError("connection reset by peer, as it is")]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match="as it is"), explained_failures(torch.device("cuda"), SHAPES):
        raise error
