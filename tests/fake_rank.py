"""A rank on the card of `tests.fake_gpu`: its model, and what it would otherwise find out by computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.cuda import attention as gpu_attention
from qwen3_dist.ops.cuda import kernels as gpu
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.worker import backends
from qwen3_dist.worker.runner import ModelRunner, StepOutput


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Has ranks choose Triton's kernels, which they do by what these compute, and answer nothing."""
    chosen = gpu_attention.Chosen(gpu_attention.BACKENDS[-1], ())
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(gpu, "_kernels", lambda *_: gpu.GpuKernels()))
        stack.enter_context(torch.no_grad())
        # FakeTensorMode does not see through inference mode.
        for method in ("launch", "warm_up", "_make_graphs"):
            stack.enter_context(patch.object(ModelRunner, method, getattr(ModelRunner, method).__wrapped__))
        stack.enter_context(patch.object(StepOutput, "result", lambda _: None))
        for user in (gpu_attention, backends):
            stack.enter_context(patch.object(user, "chosen_attention", lambda *_: chosen))
        yield


def built_model(
    config: ModelConfig, dtype: torch.dtype, parallel: ParallelContext, quantize: str | None
) -> Qwen3Model:
    """A rank's model as it comes from a checkpoint, on the card."""
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = Qwen3Model(config, parallel).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if quantize is not None:
        model.quantize()
    model.pack()
    return model
