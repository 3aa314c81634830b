"""Of the tokens of a step that nobody reads, the last block computes keys and values alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.cpu import native
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.step_plan import PromptScores, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.weights.loader import load_model
from qwen3_dist.worker import kv_cache
from tests.batches import batch_of
from tests.checkpoints import write_checkpoint

CPU, UNKNOWN = torch.device("cpu"), torch.zeros(8, dtype=torch.int64)
DRAW = SampleSpec(0.0, 1.0, 0, 0, 1, None)
TABLES = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15), (16, 17, 18, 19))
FIRST = tuple(SequenceStep(n, n, tuple(range(3 + n, 10 + n)), 0, TABLES[n], None) for n in range(5))
DECODE = SequenceStep(0, 0, (9,), 7, TABLES[0], DRAW)
GUESSED = SequenceStep(1, 1, (9, 4, 8), 7, TABLES[1], DRAW, num_drafted=2)
CHUNK = SequenceStep(2, 2, (5, 6, 7, 8), 7, TABLES[2], None)
ENDED = SequenceStep(3, 3, (1, 2, 3, 4, 5), 7, TABLES[3], DRAW)
SCORED = SequenceStep(4, 4, (1, 2, 3, 4, 5), 7, TABLES[4], DRAW, reading=PromptScores(1, (3, 4, 5), 1))
POOLED = SCORED._replace(sample=None, reading=PoolingParams())


def plan_of(*sequences: SequenceStep) -> StepPlan:
    return StepPlan.for_groups(1, [sequences])[0]


@pytest.fixture(scope="module", params=["dense", "moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), moe=request.param == "moe")


@pytest.fixture(params=["one call", "halves", "torch"])
def model(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Qwen3Model:
    if request.param == "torch":
        monkeypatch.setattr(native, "_kernels", lambda dtype: None)
    model = load_model(path, ModelConfig.from_directory(path), ParallelContext.single(), torch.float32, CPU)
    model.pack()
    if request.param != "torch" and native.kernels_for(model.like) is None:
        pytest.skip("no C++ compiler is here")
    assert (model._fused is not None) == (request.param != "torch")
    if request.param == "halves":
        model._fused = None
    return model


@pytest.mark.parametrize(
    ("sequences", "rows"),
    [
        ((DECODE, GUESSED, CHUNK, ENDED), [0, 1, 2, 3, 12]),
        ((DECODE, CHUNK), [0]),
        ((CHUNK,), []),
        ((CHUNK, ENDED, SCORED), [8, 9, 10, 11, 12, 13]),
        ((ENDED, POOLED), [4, 9]),
    ],
)
def test_what_is_read_is_what_it_would_be_if_all_were(
    model: Qwen3Model, sequences: tuple[SequenceStep, ...], rows: list[int]
) -> None:
    caches = [kv_cache.allocate(model, 20, 4) for _ in range(2)]
    batch = batch_of(plan_of(*sequences))
    assert batch.ending is not None and batch.ending.rows.tolist() == rows
    with torch.inference_mode():
        for cache in caches:
            model.hidden_and_logits(batch_of(plan_of(*FIRST)), cache)
        whole, all_logits = model.hidden_and_logits(replace(batch, ending=None), caches[0])
        read, logits = model.hidden_and_logits(batch, caches[1])
        assert whole is not None and read is not None
        expected = model.logits(whole[batch.logits_rows])
    for got in (all_logits, logits):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read, whole[rows], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    drawn = whole[batch.logits_rows]
    torch.testing.assert_close(read[batch.read.logits_rows], drawn, atol=1e-5, rtol=1e-5)


def test_a_step_that_is_read_whole_has_no_ending() -> None:
    for sequences in ((DECODE,), (DECODE, GUESSED), (DECODE, SCORED)):
        assert batch_of(plan_of(*sequences)).ending is None


def test_what_nobody_reads_is_not_computed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=True)
    config = ModelConfig.from_directory(path)
    model = load_model(path, config, ParallelContext.single(), torch.float32, CPU)
    with torch.inference_mode():
        cache = kv_cache.allocate(model, 20, 4)
        model.hidden_and_logits(batch_of(plan_of(CHUNK, ENDED)), cache)
    counts = [sum(moe.rows_by_expert().values()) for moe in model.moe_layers.values()]
    assert counts == [9 * config.num_experts_per_tok] * 3 + [config.num_experts_per_tok]
