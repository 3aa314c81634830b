"""Experts on the device: each implementation by number of rows, rebalancing, and prompts that use few experts."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.check import Figures, PlannedCheck, Setting, require
from benchmarks.gpu_check.models import (
    compare_with_reference,
    generate,
    running,
    small_checkpoint,
    small_reference,
)
from benchmarks.gpu_check.parity import MAX_ERROR, parity
from benchmarks.timing import gpu_seconds, host_seconds
from qwen3_dist.launch.processes import shared_nursery
from qwen3_dist.ops.base import ExpertWeights
from qwen3_dist.ops.cuda import experts as of_gpu
from qwen3_dist.ops.cuda.kernels import GpuKernels, working_kernels
from qwen3_dist.ops.torch_experts import counted
from qwen3_dist.ops.torch_ops import TorchOps, quantized_experts

_ROWS = (1, 8, 32, 256, 1024, 4096)
_MAX_ERROR = {"int8": 0.03, "as they are": 0.01}  # relative, of the norm


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    size = (
        _Size(128, 8, 2048, 768) if setting.on_gpu else _Size(16, 4, 256, 96)
    )  # the first is Qwen3-30B-A3B's
    rows = _ROWS if setting.on_gpu else _ROWS[:4]
    times: dict[str, dict[int, float]] = {}
    for number in rows:
        yield PlannedCheck(f"ways of {number} rows", partial(_ways, setting, size, number, times))
    yield PlannedCheck("where the ways' times cross", partial(_crossing, size, times))
    with shared_nursery():
        for quantize in ("none", "int8"):
            yield PlannedCheck(f"a move of experts, {quantize}", partial(_move, setting, quantize), 10)
        for layout, dispatch in (("tp=1", "auto"), ("tp=2,ep=2", "all_gather"), ("tp=2,ep=2", "all_to_all")):
            named = f"a prompt of one token repeated, {layout}, {dispatch}"
            yield PlannedCheck(named, partial(_one_token, setting, layout, dispatch), 10)


@dataclass(frozen=True)
class _Size:
    """A layer's experts, each [columns, dim], and the number of experts per token."""

    experts: int
    choices: int
    dim: int
    columns: int
    dtype: torch.dtype = torch.bfloat16


@functools.cache
def _weights(setting: Setting, size: _Size) -> ExpertWeights:
    generator = torch.Generator(setting.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device).to(size.dtype)

    into = (size.experts, size.columns, size.dim)
    fc1, fc2 = (random(*into) / size.dim**0.5 for _ in range(2))
    fc3 = random(size.experts, size.dim, size.columns) / size.columns**0.5
    return ExpertWeights((fc1, fc2, fc3), size.columns)


@functools.cache
def _narrow(setting: Setting, size: _Size) -> ExpertWeights:
    return quantized_experts(_weights(setting, size))


def _gpu_kernels(x: Tensor) -> GpuKernels | None:
    return working_kernels(x.device, x.dtype) if x.is_cuda else None


def _ways(setting: Setting, size: _Size, number: int, times: dict[str, dict[int, float]]) -> Figures:
    """Median microseconds of each implementation for `number` rows. Raises CheckFailed if one differs from plain
    torch."""
    generator = torch.Generator(setting.device).manual_seed(number)
    stacks = _weights(setting, size)
    x = torch.randn(number, size.dim, generator=generator, device=setting.device).to(size.dtype)
    routing = torch.rand(number, size.choices, generator=generator, device=setting.device)
    likeliest = torch.rand(number, size.experts, generator=generator, device=setting.device).argsort(dim=1)
    ids = likeliest[:, : size.choices].contiguous()
    counts = counted(ids, size.experts)
    looped = partial(TorchOps().experts, x, stacks, ids, routing, counts.clone())
    ways: dict[str, Callable[[], Tensor]] = {} if setting.on_gpu else {"one by one": looped}
    kernels = _gpu_kernels(x)
    if kernels is not None:
        narrow, routed = _narrow(setting, size), (ids, routing, counts.clone())
        ways["triton"] = partial(kernels.experts, x, stacks.stacks, None, *routed)
        ways["triton, int8"] = partial(kernels.experts, x, narrow.stacks, narrow.scales, *routed)
    if of_gpu.has_grouped_mm(x.device, x.dtype) and of_gpu.takes_grouped_mm(stacks):
        ways["grouped_mm"] = partial(of_gpu.grouped_experts, x, stacks, ids, routing, counts, kernels)
    require(
        bool(ways),
        "no implementation of experts runs here without host synchronisation: is Triton installed?",
    )
    expected = looped().float()
    figures: Figures = {}
    for way, run in ways.items():
        error = float((run().float() - expected).norm() / expected.norm())
        most = _MAX_ERROR["int8" if "int8" in way else "as they are"]
        require(error <= most, f"{way} has a relative error of {error:.3g}; at most {most:g} is allowed")
        figures[f"{way}, us"] = microseconds(run, setting)
        times.setdefault(way, {})[number] = figures[f"{way}, us"]
    return figures


def _crossing(size: _Size, times: dict[str, dict[int, float]]) -> Figures:
    """Pairs per expert from which grouped_mm is faster than Triton: the value that `FEW_PAIRS` should have."""
    ours, torchs = times.get("triton", {}), times.get("grouped_mm", {})
    faster = [rows for rows in ours if rows in torchs and torchs[rows] < ours[rows]]
    figures: Figures = {"few_pairs_now": of_gpu.FEW_PAIRS}
    if not torchs:
        return {**figures, "measured": "grouped_mm does not run here"}
    pairs = [rows * size.choices / size.experts for rows in sorted(faster)]
    return {
        **figures,
        "measured": pairs[0] if pairs else f"more than {max(ours) * size.choices / size.experts:g}",
    }


def _move(setting: Setting, quantize: str) -> Figures:
    """Rebalances experts after an uneven load; tokens must not change."""
    prompts = [[7] * 40, [7, 1, 150, 198, 0], list(range(100, 140))]
    length = 24 if setting.on_gpu else 8
    settings = {"dtype": "float32", "num_blocks": 128, "max_model_len": 1024, "quantize": quantize}
    path = small_checkpoint("moe", setting)
    with running(setting, path, "tp=2,ep=2", redundant_experts=2, **settings) as engine:
        before = generate(engine, prompts, length)
        started = time.perf_counter()
        moved = engine.experts.rebalance_all()
        seconds = time.perf_counter() - started
        after = generate(engine, prompts, length)
    require(bool(moved), "no experts moved although the load was uneven")
    figures: Figures = {"layers_moved": len(moved), "seconds": round(seconds, 2)}
    if quantize == "none":
        reference = small_reference("moe", setting)
        compared = compare_with_reference(reference, prompts, after, MAX_ERROR["float32"], greedy=True)
        return {**figures, **compared}
    changed = [
        number for number, (a, b) in enumerate(zip(before, after, strict=True)) if a.token_ids != b.token_ids
    ]
    require(not changed, f"prompts {changed} have other tokens after the move")
    return figures


def _one_token(setting: Setting, layout: str, dispatch: str) -> Figures:
    """Parity for a prompt whose tokens all choose the same experts."""
    tokens = 8192 if setting.on_gpu else 512
    return parity(
        setting,
        "moe",
        layout,
        [[5] * tokens],
        length=4,
        dtype="float32",
        moe_dispatch=dispatch,
        max_model_len=tokens + 64,
        num_blocks=tokens // 16 + 8,
        max_num_batched_tokens=tokens,
    )


def microseconds(call: Callable[[], object], setting: Setting) -> float:
    """Median time of a call after two warm-up calls; on a GPU by its own clock."""
    seconds = gpu_seconds(call, 23) if setting.on_gpu else host_seconds(call, 5)
    return round(1e6 * statistics.median(seconds[2:]), 1)
