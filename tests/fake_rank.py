"""A rank on the card of `tests.fake_gpu`: its model, and what it would otherwise find out by computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.experts import Experts
from qwen3_dist.model.finalize import finalize
from qwen3_dist.model.linear import Linear
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.cuda.attention import BACKENDS, Chosen
from qwen3_dist.ops.cuda.deterministic import DeterministicCudaOps
from qwen3_dist.ops.cuda.experts import has_grouped_mm
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.quantization import ROUNDS_TO
from qwen3_dist.quantization_config import read_quantization
from qwen3_dist.weights.loader import _hold_codes
from qwen3_dist.weights.weight_plan import WeightPlan
from qwen3_dist.worker.runner import ModelRunner, StepOutput

CODES = {  # formats of quantised checkpoints
    "fp8": ROUNDS_TO["fp8"],
    "awq": read_quantization({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}),
    "nvfp4": read_quantization({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
}


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
    """A rank's model as it comes from a checkpoint, on the card. `quantize`: "int8", or one of CODES."""
    config = replace(config, quantization=CODES.get(quantize or ""))
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = (
            Qwen3Model(config, parallel, triton_ops(dtype, parallel.deterministic))
            .eval()
            .requires_grad_(False)
        )
        _hold_codes(model, list(WeightPlan(config, parallel.layout, set()).all_pieces(parallel.coords)))
    torch.set_default_dtype(torch.float32)
    finalize(model, int8=quantize == "int8")
    return model


def weights_of_codes(layer: torch.nn.Module) -> Iterator[tuple[int, int]]:
    """The shape of each weight, or of each expert's, that is codes."""
    if isinstance(layer, Experts) and layer.codes:
        yield from layer._shape.matrices
    elif isinstance(layer, Linear) and layer.codes:
        yield layer.out_features, layer.in_features
