"""The kernels of whole blocks, and of all blocks of a stage in one call, against plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.finalize import finalize
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.cpu.ops import CpuOps
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.step_plan import PromptLogprobsSpec, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.weights.loader import load_model
from qwen3_dist.worker import kv_cache
from tests.batches import batch_of
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.usefixtures("two_threads")

CPU = torch.device("cpu")
DRAW = SampleSpec(0.0, 1.0, 0, 0, 1, None)
TABLES = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15), (16, 17, 18, 19))
FIRST = tuple(SequenceStep(n, n, tuple(range(3 + n, 10 + n)), 0, TABLES[n], None) for n in range(5))
DECODE = SequenceStep(0, 0, (9,), 7, TABLES[0], DRAW)
GUESSED = SequenceStep(1, 1, (9, 4, 8), 7, TABLES[1], DRAW, num_drafted=2)
CHUNK = SequenceStep(2, 2, (5, 6, 7, 8), 7, TABLES[2], None)
ENDED = SequenceStep(3, 3, (1, 2, 3, 4, 5), 7, TABLES[3], DRAW)
SCORED = SequenceStep(
    4, 4, (1, 2, 3, 4, 5), 7, TABLES[4], DRAW, prompt_request=PromptLogprobsSpec(1, (3, 4, 5), 1)
)
POOLED = SCORED._replace(sample=None, prompt_request=PoolingParams())


@pytest.fixture(scope="module", params=["dense", "moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), moe=request.param == "moe")


@pytest.fixture(params=["one call", "block by block"])
def model(request: pytest.FixtureRequest, path: Path) -> Qwen3Model:
    model = load_model(path, ModelConfig.from_directory(path), ParallelContext.single(), torch.float32, CPU)
    finalize(model)
    if not isinstance(model.ops, CpuOps):
        pytest.skip("no C++ compiler is here")
    assert model.whole_stage is not None
    if request.param == "block by block":
        model.whole_stage = None
    return model


@pytest.mark.parametrize(
    "sequences",
    [
        (DECODE, GUESSED, CHUNK, ENDED),
        (DECODE, CHUNK),
        (CHUNK,),
        (CHUNK, ENDED, SCORED),
        (ENDED, POOLED),
    ],
)
def test_kernels_of_blocks_give_what_torch_gives(
    model: Qwen3Model, path: Path, sequences: tuple[SequenceStep, ...]
) -> None:
    """Hidden states, logits and the cache."""
    plain = load_model(path, model.config, model.parallel, torch.float32, CPU, ops=TorchOps())
    batches = [batch_of(StepPlan.for_groups(1, [parts])[0]) for parts in (FIRST, sequences)]
    hidden, logits, caches = [], [], []
    with torch.inference_mode():
        for each in (model, plain):
            cache = kv_cache.allocate(each, 20, 4)
            each(batches[0], cache)
            got = each(batches[1], cache)
            hidden.append(got[0])
            logits.append(got[1])
            caches.append(cache)
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
