"""A rank on the card of `tests.fake_gpu`: its model, and what it would otherwise find out by computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.finalize import finalize
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.cuda.attention import BACKENDS, Chosen
from qwen3_dist.ops.cuda.deterministic import DeterministicCudaOps
from qwen3_dist.ops.cuda.experts import has_grouped_mm
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.worker.runner import ModelRunner, StepOutput


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Has ranks answer nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # FakeTensorMode does not see through inference mode.
        for method in ("launch", "warm_up", "_make_graphs"):
            stack.enter_context(patch.object(ModelRunner, method, getattr(ModelRunner, method).__wrapped__))
        stack.enter_context(patch.object(StepOutput, "result", lambda _: None))
        yield


def triton_ops(dtype: torch.dtype, deterministic: bool = False) -> CudaOps:
    """All of Triton's kernels, which a rank chooses by what they compute."""
    device, kernels = torch.device("cuda"), GpuKernels()
    by_dtype = dict.fromkeys((dtype, torch.float32), kernels)
    if deterministic:
        return DeterministicCudaOps(device, dtype, by_dtype)
    return CudaOps(device, dtype, by_dtype, Chosen(BACKENDS[-1], ()), has_grouped_mm(device, dtype))


def built_model(
    config: ModelConfig, dtype: torch.dtype, parallel: ParallelContext, quantize: str | None
) -> Qwen3Model:
    """A rank's model as it comes from a checkpoint, on the card."""
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = (
            Qwen3Model(config, parallel, triton_ops(dtype, parallel.deterministic))
            .eval()
            .requires_grad_(False)
        )
    torch.set_default_dtype(torch.float32)
    finalize(model, int8=quantize is not None)
    return model
