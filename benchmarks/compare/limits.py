"""Limits of the machine, memory bandwidth and matrix product rate, and the least time of a row under them."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

import torch

from benchmarks.compare.workload import Row
from benchmarks.timing import gpu_seconds, host_seconds
from cluster.planning.memory import active_parameters, total_parameters
from qwen3_dist.config import ModelConfig

_BYTES = 2  # per bf16 weight
_READ_S = 1.0  # much longer than the skew of processes after a barrier


@dataclass(frozen=True)
class Machine:
    """Measured memory bandwidth and matrix product rate, the higher of bf16 and fp32."""

    read_bytes_per_s: float
    flops_per_s: float


def measure_machine() -> Machine:
    return Machine(_read_rate(), product_rate())


def measure_gpu() -> Machine:
    """Limits of the current GPU: bandwidth from the faster of a copy and a sum of 4 GiB, and the rate of large bf16
    products with a transposed matrix, as in layers."""
    x = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    read = max(
        2 * x.nbytes / min(gpu_seconds(lambda: y.copy_(x), 10)), x.nbytes / min(gpu_seconds(x.sum, 10))
    )
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return Machine(read, 2 * 8192**3 / min(gpu_seconds(lambda: torch.mm(a, b.T), 10)))


def row_limit(config: ModelConfig, row: Row, machine: Machine) -> float:
    """Least seconds of a row: each step reads the weights and the KV cache that it needs once, and computes its
    products.

    With even routing, b tokens need a share of 1 - (1 - K / E)^b of a layer's experts.
    """
    seconds = _step(config, row.num_prompts, row.input_len, 0, machine)
    for made in range(1, row.output_len):
        seconds += _step(config, row.num_prompts, 1, row.input_len + made - 1, machine)
    return seconds


def _step(config: ModelConfig, sequences: int, queries: int, before: int, machine: Machine) -> float:
    """Least seconds of a step with `queries` new tokens per sequence after `before` cached ones. In the last block,
    only the last token of a sequence needs more than keys and values."""
    tokens, vocabulary = sequences * queries, config.vocab_size * config.emb_dim
    layers = active_parameters(config) - vocabulary * (1 if config.tie_word_embeddings else 2)
    pairs = sequences * queries * (before + (queries + 1) / 2)  # query-key pairs
    pairs_of_last = sequences * (before + queries)
    beyond_cache = layers / config.n_layers - 2 * config.emb_dim * config.n_kv_groups * config.head_dim
    flops = 2 * (layers * tokens - beyond_cache * (tokens - sequences) + vocabulary * sequences)
    flops += 4 * (pairs * (config.n_layers - 1) + pairs_of_last) * config.n_heads * config.head_dim
    weights = layers + vocabulary
    if config.num_experts:
        share = config.num_experts_per_tok / config.num_experts
        experts = (total_parameters(config) - active_parameters(config)) / (1 - share)
        weights += experts * (1 - (1 - share) ** tokens - share)
    cached = 2 * sequences * before * config.n_layers * config.n_kv_groups * config.head_dim
    return max((weights + cached) * _BYTES / machine.read_bytes_per_s, flops / machine.flops_per_s)


def _read_rate() -> float:
    """Memory bandwidth in bytes per second, with one reading process per core."""
    cores = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(cores), context.SimpleQueue()
    readers = [context.Process(target=_read, args=(together, rates)) for _ in range(cores)]
    for reader in readers:
        reader.start()
    total = sum(rates.get() for _ in readers)
    for reader in readers:
        reader.join()
    return total


def _read(together: Barrier, rates: SimpleQueue[float]) -> None:
    torch.set_num_threads(1)
    x = torch.ones(1 << 27, dtype=torch.float32)
    x.sum()
    together.wait()
    started, times = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < _READ_S or not times:
        x.sum()
        times += 1
    rates.put(times * x.nbytes / taken)


def product_rate() -> float:
    """Floating-point operations per second of torch's matrix products on the CPU, in bf16 or fp32."""
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(1024, 3072).to(dtype) for _ in range(2))
        torch.mm(a, b.T)
        seconds = min(host_seconds(lambda a=a, b=b: torch.mm(a, b.T), 5))  # type: ignore[misc]
        best = max(best, 2 * 1024 * 1024 * 3072 / seconds)
    return best
