"""CPU kernels against torch and against memory bandwidth, measured alternately in one run.

    python -m benchmarks.kernels

Matrix products stream the weights of 24 layers, which do not fit into caches. `of_read` is the share of the bandwidth
at which torch sums the same bytes; `ours_over_int8` is the speedup of int8 weights, `ours_over_fp8` that of a KV cache
in fp8.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import keep
from qwen3_dist.ops.base import Matrix
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cpu.kernels import Kernels, load_kernels
from qwen3_dist.ops.kv_codes import encode
from qwen3_dist.ops.quantize import as_int8
from qwen3_dist.ops.torch_attention import gathered_attention

SHAPES = [(6144, 1024), (1024, 3072)]
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 256)
CONTEXTS = [(1, 256), (1, 4096), (8, 1024), (16, 2048)]


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call. The calls alternate, so that other load on the machine affects all alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def require_kernels(dtype: torch.dtype) -> Kernels:
    kernels = load_kernels(dtype)
    assert kernels is not None, "the CPU kernels need a C++ compiler"
    return kernels


def products(dtype: torch.dtype) -> list[dict[str, Any]]:
    kernels, rows = require_kernels(dtype), []
    for outputs, inner in SHAPES:
        weights = [(torch.randn(outputs, inner) / inner**0.5).to(dtype) for _ in range(24)]
        packed = [Matrix(kernels.pack(weight), outputs) for weight in weights]
        int8 = [Matrix(kernels.pack(weight), outputs, scale) for weight, scale in map(as_int8, weights)]
        words = [weight.view(torch.int64) for weight in weights]
        for count in ROWS:
            x = torch.randn(count, inner).to(dtype)
            calls: dict[str, Callable[[], object]] = {
                "ours": lambda x=x, packed=packed: [kernels.linear(x, w) for w in packed],
                "int8": lambda x=x, int8=int8: [kernels.linear(x, w) for w in int8],
                "torch": lambda x=x, weights=weights: [F.linear(x, w) for w in weights],
                "read": lambda words=words: [w.sum() for w in words],
            }
            if count > 32:
                calls.pop("read")
            taken = interleaved(calls, 5 if count > 32 else 9)
            row = {"op": "linear", "dtype": str(dtype)[6:], "shape": f"{count} x {outputs} x {inner}"}
            row["ours_us"] = round(taken["ours"] / 24 * 1e6, 1)
            row["torch_over_ours"] = round(taken["torch"] / taken["ours"], 2)
            row["ours_over_int8"] = round(taken["ours"] / taken["int8"], 2)
            row["of_read"] = round(taken["read"] / taken["ours"], 2) if "read" in taken else ""
            row["gflops"] = round(2 * count * outputs * inner * 24 / taken["ours"] / 1e9, 1)
            rows.append(row)
    return rows


def attention(dtype: torch.dtype, groups: int = 8, heads: int = 16, dim: int = 128) -> list[dict[str, Any]]:
    kernels, rows, block_size = require_kernels(dtype), [], 16
    for (sequences, context), queries in itertools.product(CONTEXTS, (1, 64)):
        width = context // block_size
        caches = [torch.randn(2, sequences * width, block_size, groups, dim).to(dtype) for _ in range(4)]
        codes = [encode(cache, 1.0) for cache in caches]
        tables = torch.randperm(sequences * width).view(sequences, width).int()
        table_rows = torch.arange(sequences)
        starts = torch.arange(sequences + 1) * queries
        lens = torch.full((sequences,), context)
        q, unused = torch.randn(sequences * queries, heads, dim).to(dtype), torch.empty(0)
        decodes = sequences if queries == 1 else 0
        host = ((queries,) * sequences, (context,) * sequences, decodes)
        batch = StepBatch(unused, unused, unused, tables, table_rows, lens, starts, *host, False, unused)

        def ours(
            q: Any = q, caches: Any = caches, metadata: Any = (tables, table_rows, lens, starts, None)
        ) -> None:
            for keys, values in caches:
                kernels.attention(q, LayerCache(keys, values), *metadata)

        def fp8(q: Any = q, codes: Any = codes, ours: Any = ours) -> None:
            ours(q, codes)

        def theirs(q: Any = q, caches: Any = caches, batch: StepBatch = batch) -> None:
            for keys, values in caches:
                gathered_attention(q, LayerCache(keys, values), batch, None)

        words = [cache.view(torch.int64) for cache in caches]
        taken = interleaved(
            {"ours": ours, "fp8": fp8, "torch": theirs, "read": lambda words=words: [w.sum() for w in words]},
            7,
        )
        shape = f"{sequences} seqs x {queries} queries over {context}"
        row = {"op": "attention", "dtype": str(dtype)[6:], "shape": shape}
        row["ours_us"] = round(taken["ours"] / 4 * 1e6, 1)
        row["torch_over_ours"] = round(taken["torch"] / taken["ours"], 2)
        row["ours_over_fp8"] = round(taken["ours"] / taken["fp8"], 2)
        row["of_read"] = round(taken["read"] / taken["ours"], 2)
        rows.append(row)
    return rows


def main() -> None:
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            rows += [*products(dtype), *attention(dtype)]
    keep("kernels", rows)


if __name__ == "__main__":
    main()
