"""What of the GPU path a CPU can run: the choice of a backend, and decode steps padded to a captured size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.finalize import finalize
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cuda import attention as gpu_attention
from qwen3_dist.ops.cuda.attention import Backend, Chosen, chosen_attention
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.ops.torch_attention import gathered_attention
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep, StepPlan
from qwen3_dist.weights.loader import load_model
from qwen3_dist.weights.source import bundled_path
from qwen3_dist.worker import kv_cache
from qwen3_dist.worker.decode_graphs import DecodeGraphs
from qwen3_dist.worker.inputs import StepInputs
from tests.batches import batch_of, random_batch
from tests.checkpoints import write_checkpoint
from tests.quantized import write_fp8
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SHAPES = (CPU, torch.float32, 8, 2, 16, 4)  # heads, KV groups, head_dim, block_size


@pytest.mark.parametrize("query_lens", [(1, 1, 1, 9, 23), (1, 1, 1, 1, 1), (7, 2, 5, 9, 23)])
@pytest.mark.parametrize("window", [None, 6])
def test_triton_attends_to_decodes_and_prompts_of_one_step(
    query_lens: tuple[int, ...], window: int | None
) -> None:
    torch.manual_seed(0)
    batch = random_batch((12, 70, 17, 9, 150), query_lens, block_size=4)
    cache = LayerCache(*torch.randn(2, 128, 4, 2, 16))
    q = torch.randn(sum(query_lens), 8, 16)
    got = gpu_attention.triton(q, cache, batch, window)
    torch.testing.assert_close(got, gathered_attention(q, cache, batch, window), atol=1e-5, rtol=1e-5)


def wrong(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    return gathered_attention(q, cache, batch, window) * 1.1


def broken(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    raise RuntimeError("no kernel image for this card")


def test_the_first_backend_that_is_right_here_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, triton = (
        (Backend("broken", broken), Backend("wrong", wrong)),
        Backend("Triton", gpu_attention.triton),
    )
    for backends, expected in (((*bad, triton), gpu_attention.triton), (bad, gathered_attention)):
        monkeypatch.setattr(gpu_attention, "BACKENDS", backends)
        chosen_attention.cache_clear()
        assert chosen_attention(*SHAPES).backend.attend is expected
    chosen_attention.cache_clear()


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Qwen3Model:
    path = write_checkpoint(tmp_path, moe=request.param)
    return load_model(path, ModelConfig.from_directory(path), ParallelContext.single(), torch.float32, CPU)


def empty_tables() -> Tensor:
    """Tables of 8 sequences of up to 64 tokens, and of padding, whose block is the last of 129."""
    tables = torch.zeros(9, 16, dtype=torch.int32)
    tables[8] = 128
    return tables


def decodes(n: int, tables: Tensor | None = None) -> StepBatch:
    """Sequences of 9 tokens and more, whose next token is to be computed; their blocks are put in `tables`."""
    lengths = tuple(range(9, 9 + n))
    batch = random_batch(lengths, (1,) * n, block_size=4)
    positions = batch.context_lens - 1
    blocks = batch.block_tables.gather(1, positions[:, None] // 4)[:, 0].long()
    tables = empty_tables() if tables is None else tables
    tables[:n, : batch.block_tables.shape[1]] = batch.block_tables
    return replace(
        batch,
        block_tables=tables,
        token_ids=torch.arange(3, 3 + n),
        positions=positions,
        slots=blocks * 4 + positions % 4,
        logits_rows=torch.arange(n),
        decodes_only=True,
    )


@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_padded_decode_step_is_the_step_itself(model: Qwen3Model, n: int) -> None:
    def fresh_cache() -> list[LayerCache]:
        torch.manual_seed(1)
        cache = kv_cache.allocate(model, 129, 4)
        for layer in cache:
            layer.keys.normal_()
            layer.values.normal_()
        return cache

    cache, padded_cache, tables = fresh_cache(), fresh_cache(), empty_tables()
    graphs = DecodeGraphs(model, padded_cache, 6, tables)
    torch.manual_seed(2)
    for size in (6, n, 5, 6):  # what a step leaves behind must not show in the next
        batch = decodes(size, tables)
        assert graphs.can_run(batch)
        with torch.inference_mode():
            (_, expected), got = model(batch, cache), graphs.run(batch)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(padded_cache, cache, strict=True):  # all but the spare block
        torch.testing.assert_close(ours.keys[:-1], theirs.keys[:-1])
        torch.testing.assert_close(ours.values[:-1], theirs.values[:-1])


def test_guesses_are_decodes_of_their_own_in_a_padded_step(model: Qwen3Model) -> None:
    spec = SampleSpec(0.0, 1.0, 0, 0, 10, None)
    tables, prompt = ((8, 1, 3), (5, 9, 2, 0)), tuple(range(9))
    prompts = [SequenceStep(n, n, prompt, 0, table, None) for n, table in enumerate(tables)]
    decodes = [
        SequenceStep(0, 0, (7,), 9, tables[0], spec),
        SequenceStep(1, 1, (7, 8, 9, 4), 9, tables[1], spec, num_drafted=3),
    ]
    first, plan = (StepPlan.for_groups(1, [tuple(sequences)])[0] for sequences in (prompts, decodes))
    assert plan.decodes_only and not first.decodes_only
    with torch.inference_mode():
        logits = []
        for single in (False, True):
            cache = kv_cache.allocate(model, 129, 4)
            inputs = StepInputs(2, 16, 4, CPU, spare_block=128)
            graphs = DecodeGraphs(model, cache, 8, inputs.tables)
            model(inputs.batch(first), cache)
            batch = inputs.batch(plan, in_single_tokens=single)
            assert graphs.can_run(batch)
            logits.append(graphs.run(batch) if single else model(batch, cache)[1])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("moe", "weights"),
    [
        pytest.param(moe, weights, marks=pytest.mark.slow if moe and weights == "fp8" else ())
        for moe in (False, True)
        for weights in ("plain", "int8", "fp8")
    ],
)
def test_a_model_of_gpu_kernels_is_the_model_itself(weights: str, moe: bool, tmp_path: Path) -> None:
    """All that a GPU runs but the products of torch, interpreted."""
    fp8 = weights == "fp8"
    path = write_fp8(tmp_path, 24, 20, moe=moe).quantized if fp8 else write_checkpoint(tmp_path, moe=moe)
    spec, table = SampleSpec(0.0, 1.0, 0, 0, 10, None), (8, 1, 3)
    prompts = (
        SequenceStep(0, 0, tuple(range(3, 12)), 0, table, spec),
        SequenceStep(1, 1, (5, 7), 0, (4,), spec),
    )
    mixed = (SequenceStep(0, 0, (7,), 9, table, spec), SequenceStep(2, 2, (9, 3, 8), 0, (6,), spec))
    batches = [batch_of(StepPlan.for_groups(1, [parts])[0]) for parts in (prompts, mixed)]

    def run(ops: Ops) -> list[Tensor | None]:
        config, alone = ModelConfig.from_directory(path), ParallelContext.single()
        model = load_model(path, config, alone, torch.float32, CPU, ops=ops)
        finalize(model, int8=weights == "int8")
        cache = kv_cache.allocate(model, 16, 4)
        with torch.inference_mode():
            return [model(batch, cache)[1] for batch in batches]

    triton = Chosen(Backend("Triton", gpu_attention.triton), ())
    ops = CudaOps(CPU, torch.float32, {torch.float32: GpuKernels()}, triton, grouped_mm=False)
    for got, logits in zip(run(ops), run(TorchOps()), strict=True):
        torch.testing.assert_close(got, logits, atol=2e-5, rtol=2e-5)


def test_other_steps_are_not_taken(model: Qwen3Model) -> None:
    cache = kv_cache.allocate(model, 129, 4)
    graphs = DecodeGraphs(model, cache, 4, empty_tables())
    step = decodes(3)
    assert graphs.can_run(step)
    assert not graphs.can_run(decodes(5))  # more than were captured
    assert not graphs.can_run(replace(step, decodes_only=False))  # a prompt beside them
    assert not graphs.can_run(replace(step, group_tokens=(3, 5)))  # another group has more


def check_graphs_of_two_groups(parallel: ParallelContext) -> None:
    """Three decodes in one dp group and none in the other, as the padded step that a graph holds."""
    path = bundled_path()
    config = ModelConfig.from_directory(path)
    model = load_model(path, config, parallel, torch.float32, CPU)
    alone = load_model(path, config, ParallelContext.single(), torch.float32, CPU)
    torch.manual_seed(1)
    cache = kv_cache.allocate(model, 129, 4)
    for layer in cache:
        layer.keys.normal_()
        layer.values.normal_()
    torch.manual_seed(2)
    tables = empty_tables()
    step = replace(decodes(3, tables), group_tokens=(3, 0))
    idle = batch_of(StepPlan(1, (), (3, 0), True))
    with torch.inference_mode():
        _, expected = alone(replace(step, group_tokens=()), cache)
        graphs = DecodeGraphs(model, cache, 4, tables)
        batch = step if parallel.coords.group == 0 else idle
        assert graphs.can_run(batch)
        before = sum(sum(moe.rows_by_expert().values()) for moe in model.moe_layers.values())
        got = graphs.run(batch)
        counted = sum(sum(moe.rows_by_expert().values()) for moe in model.moe_layers.values()) - before
    assert got is not None
    if parallel.coords.group == 0:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    everybodys = parallel.dp.all_reduce(torch.tensor([float(counted)]))
    assert everybodys.item() == 3 * config.num_experts_per_tok * len(
        model.moe_layers
    )  # padding counts nowhere


def test_groups_of_other_sizes_run_one_padded_step_together() -> None:
    run_ranks(check_graphs_of_two_groups, "dp=2,ep=2")
