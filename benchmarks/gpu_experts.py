"""A layer's experts on a GPU by each of the ways that compute them, and how far each is from one product at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3_dist.kernels import gpu_kernels_for
from qwen3_dist.layers.experts import counted, grouped_experts, grouped_mm_works, looped_experts
from qwen3_dist.layers.linear import as_int8

_ROWS = (1, 8, 32, 256, 1024, 4096)


def measure_experts(num_experts: int, choices: int, dim: int, columns: int) -> list[dict[str, Any]]:
    """Microseconds of `num_experts` [columns, dim] in bf16, top `choices`, by rows of a step; medians of 20."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    fc1, fc2 = (drawn(num_experts, columns, dim) / dim**0.5 for _ in range(2))
    stacks = (fc1, fc2, drawn(num_experts, dim, columns) / columns**0.5)
    (one, by_one), (two, by_two), (three, by_three) = map(as_int8, stacks)
    narrow, scales = (one, two, three), (by_one, by_two, by_three)
    rows = []
    for number in _ROWS:
        x, weights = drawn(number, dim), torch.rand(number, choices, generator=generator, device=device)
        likeliest = torch.rand(number, num_experts, generator=generator, device=device).argsort(dim=1)
        ids = likeliest[:, :choices].contiguous()
        counts = counted(ids, num_experts)
        ways: dict[str, Callable[[], Tensor]] = {}
        kernels = gpu_kernels_for(x)
        if kernels is not None:
            routed = (ids, weights, counts.clone())
            ways["triton"] = partial(kernels.experts, x, stacks, None, *routed)
            ways["triton, int8"] = partial(kernels.experts, x, narrow, scales, *routed)
        if grouped_mm_works(x, fc1):
            ways["grouped_mm"] = partial(grouped_experts, x, stacks, ids, weights, counts)
        expected = looped_experts(x, stacks, None, ids, weights).float()
        for way, run in ways.items():
            error = ((run().float() - expected).norm() / expected.norm()).item()
            rows.append(
                {"experts by": way, "rows": number, "us": _microseconds(run), "error": round(error, 4)}
            )
    return rows


def _microseconds(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return round(statistics.median(times[3:]), 1)
