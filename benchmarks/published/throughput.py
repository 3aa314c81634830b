"""The presets' predictions against published throughput of other engines.

The presets are not fitted to these rows. If a source does not say how many sequences ran, as many as fit are assumed,
at most 256 per dp group (vLLM's default), or 1024 for TensorRT-LLM's maximum load.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from cluster.hardware import PRESETS, Cluster
from cluster.planning.clients import closed_loop
from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.official import find_config
from cluster.planning.walk import StepRules, Workload, prompts_at_once
from qwen3_dist.layout import Layout
from qwen3_dist.step_defaults import STEP_DEFAULTS

# NVIDIA's export variant of the H100: 96 GB, 4.0 TB/s, 148 TFLOP/s dense bf16, the same NVLink.
_H20 = replace(PRESETS["H100"].device, name="H20", memory_bytes=96 * 10**9, read_bytes_per_s=4.0e12)
H20 = replace(PRESETS["H100"], device=replace(_H20, flops_per_s=148e12))


@dataclass(frozen=True)
class Published:
    """A published throughput in tokens/s/GPU. `counts_input`: prompt tokens count too. output_len 0: prefill only.
    kv_bytes: bytes of a number in the KV cache. depth: steps in flight, as of `Walk`."""

    source: str
    model: str
    cluster: Cluster
    gpus: int
    layout: str
    input_len: int
    output_len: int
    tokens_per_s_per_gpu: float
    kv_bytes: float = 2.0
    max_num_seqs: int = 256
    counts_input: bool = False
    depth: int = 2


_GPU = STEP_DEFAULTS["cuda"]
_BIG, _BIG_FP8, _SMALL = "Qwen3-235B-A22B", "Qwen3-235B-A22B-FP8", "Qwen3-30B-A3B"
_TRT, _GPUSTACK = "TensorRT-LLM perf overview", "GPUStack performance lab, vLLM 0.11"
ROWS = [
    Published(_TRT, _BIG_FP8, PRESETS["H200"], 4, "dp=4,ep=4", 1000, 1000, 3288, 1, 1024),
    Published(_TRT, _BIG_FP8, PRESETS["H100"], 8, "dp=8,ep=8", 1000, 1000, 1932, 1, 1024),
    Published(
        _GPUSTACK, _BIG, PRESETS["H100"], 8, "tp=8", 2000, 100, 23858.69 / 8, counts_input=True, depth=1
    ),
    Published(
        _GPUSTACK, _BIG, PRESETS["H100"], 8, "tp=8", 4000, 200, 21113.53 / 8, counts_input=True, depth=1
    ),
    Published(
        _GPUSTACK, _BIG_FP8, PRESETS["H100"], 4, "tp=4", 2000, 100, 18950.04 / 4, counts_input=True, depth=1
    ),
    Published(
        _GPUSTACK, _BIG_FP8, PRESETS["H100"], 4, "tp=4", 4000, 200, 16478.79 / 4, counts_input=True, depth=1
    ),
    Published("InferSim README, SGLang", _SMALL, H20, 1, "tp=1", 4096, 0, 16594),
    Published("nano-vllm README, vLLM", "Qwen3-0.6B", PRESETS["A100"], 1, "tp=1", 562, 562, 9530, depth=1),
]


def predicted(row: Published) -> float:
    """Predicted tokens/s/GPU."""
    cluster = replace(row.cluster, num_devices=row.gpus)
    config, layout = find_config(row.model)[1], Layout.parse(row.layout)
    model = CostModel(config, layout, cluster, kv_bytes=row.kv_bytes)
    length = row.input_len + row.output_len
    if row.output_len == 0:
        return length / model.step_seconds(StepShape(0, 0, length, length * (length + 1) // 2, 1))
    capacity = model.kv_capacity_tokens(_GPU.max_num_batched_tokens, _GPU.max_num_seqs)
    batch = min(row.max_num_seqs, capacity // length)
    clients = batch * layout.dp
    most = prompts_at_once(clients, row.output_len)
    rules = StepRules(_GPU.max_num_batched_tokens, clients, capacity * layout.dp, most, layout.dp)
    seen = closed_loop(model, rules, Workload(row.input_len, row.output_len), clients, depth=row.depth)
    counted = length if row.counts_input else row.output_len
    return seen.requests_per_s * counted / row.gpus


def main() -> None:
    print("| source | model | GPUs | layout | in/out | published | predicted | error |")
    print("|---|---|---|---|---|---|---|---|")
    errors = []
    for row in ROWS:
        value = predicted(row)
        errors.append(value / row.tokens_per_s_per_gpu - 1)
        gpus = f"{row.gpus}×{row.cluster.device.name}"
        lengths = f"{row.input_len}/{row.output_len or 'prompt only'}"
        rates = f"{row.tokens_per_s_per_gpu:,.0f} | {value:,.0f} | {errors[-1]:+.0%}"
        print(f"| {row.source} | {row.model} | {gpus} | {row.layout} | {lengths} | {rates} |")
    print(f"median absolute error {statistics.median(map(abs, errors)):.0%}")
