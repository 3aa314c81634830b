"""A cluster and models with round figures, so that tests can work step times out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.hardware import Cluster, Device, Link
from qwen3_dist.config import ModelConfig

# Reads 1 GB/s (1 µs a kB), multiplies 1 TFLOP/s; a message takes 1 µs and 1 µs a kB.
PLAIN = Cluster(
    Device("plain", 10**9, 1e9, 1e12, memory_utilization=1.0),
    num_devices=8,
    devices_per_node=4,
    inside=Link(1e-6, 1e9),
    between=Link(10e-6, 1e8),
    step_overhead_s=0.0,
)
DENSE = ModelConfig(
    vocab_size=1000,
    emb_dim=100,
    n_layers=2,
    n_heads=4,
    n_kv_groups=2,
    head_dim=50,
    hidden_dim=300,
    context_length=4096,
)
MOE = replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_hidden_dim=50)


def cluster(**changes: Any) -> Cluster:
    return replace(PLAIN, **changes)
