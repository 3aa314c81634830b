"""What the machine allows: bytes it reads and bf16 products it makes in a second, and what a row costs of them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

import torch

from benchmarks.compare.workload import Row
from cluster.planning.memory import active_parameters, total_parameters
from qwen3_dist.config import ModelConfig

_BYTES = 2  # of a bf16 weight
_READ_S = 1.0  # long beside what processes that leave a barrier together are apart


@dataclass(frozen=True)
class Machine:
    """Measured limits; the product rate is the better of torch's bf16 and fp32, at its best size."""

    read_bytes_per_s: float
    flops_per_s: float


def measure_machine() -> Machine:
    return Machine(_read_rate(), product_rate())


def measure_gpu() -> Machine:
    """The current GPU: the better of a copy and a sum of 4 GiB, far beyond its caches; bf16 products at a size that
    fills it, of a matrix with a transposed one, as layers multiply."""
    x = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    read = max(2 * x.nbytes / _gpu_seconds(lambda: y.copy_(x)), x.nbytes / _gpu_seconds(x.sum))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return Machine(read, 2 * 8192**3 / _gpu_seconds(lambda: torch.mm(a, b.T)))


def _gpu_seconds(call: Callable[[], object]) -> float:
    """Least seconds of a call, of ten, by the GPU's clock: the host's would add a launch and a wait, a fiftieth of a
    copy."""
    best = float("inf")
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def row_limit(config: ModelConfig, row: Row, machine: Machine) -> float:
    """Least seconds of a row: each step reads the weights and the cache that it needs once and makes their products.

    Of the experts of a layer, b tokens need a share of 1 - (1 - K / E)^b, if each chooses K of E evenly.
    """
    seconds = _step(config, row.num_prompts, row.input_len, 0, machine)
    for made in range(1, row.output_len):
        seconds += _step(config, row.num_prompts, 1, row.input_len + made - 1, machine)
    return seconds


def _step(config: ModelConfig, sequences: int, queries: int, before: int, machine: Machine) -> float:
    """`queries` tokens of each sequence, which has so many `before` them. The last block owes all but the last of
    them nothing but keys and values."""
    tokens, vocabulary = sequences * queries, config.vocab_size * config.emb_dim
    layers = active_parameters(config) - vocabulary * (1 if config.tie_word_embeddings else 2)
    pairs = sequences * queries * (before + (queries + 1) / 2)  # of a query and a key it sees
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
    """Bytes per second that one process per core reads while all others read too."""
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
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(1024, 3072).to(dtype) for _ in range(2))
        torch.mm(a, b.T)
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(a, b.T)
            best = max(best, 2 * 1024 * 1024 * 3072 / (time.perf_counter() - started))
    return best
