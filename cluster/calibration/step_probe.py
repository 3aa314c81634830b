"""Runs the engine on tiny random models to measure the overheads of a step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.hardware import Cluster
from cluster.planning.cost_model import CostModel, StepShape
from qwen3_dist.benchmark import Workload, measure, warm_up
from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.engine import Engine
from qwen3_dist.layout import Layout
from qwen3_dist.settings import EngineConfig

LAYERS = (2, 18)
BATCHES = (1, 4, 16)
_PROMPT, _LONG_PROMPT, _OUTPUT = 8, 256, 48
# So small that matrix products take next to no time.
_TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}


def decode_steps(layout: Layout, device: str) -> list[tuple[int, int, float]]:
    """(layers, sequences, seconds of a decode step) of the tiny models on `layout`."""
    found = []
    for layers in LAYERS:
        for batch, figures in zip(BATCHES, _figures(layers, layout, device, BATCHES, _PROMPT), strict=True):
            found.append((layers, batch, figures["itl_ms"]["p50"] / 1e3))
    return found


def prompt_step(device: str) -> float:
    """Seconds of a step with one prompt of 256 tokens, on the tiny model with two layers."""
    (figures,) = _figures(LAYERS[0], Layout(), device, (1,), _LONG_PROMPT)
    seconds: float = figures["ttft_ms"]["p50"] / 1e3
    return seconds


def with_overheads(cluster: Cluster, steps: Sequence[tuple[int, int, float]], prompt_s: float) -> Cluster:
    """`cluster` with overheads fitted to measured `steps` of one rank: (layers, sequences, seconds)."""
    residuals = [seconds - _predicted(cluster, Layout(), layers, batch) for layers, batch, seconds in steps]
    step, sequence, layer = _non_negative([[1.0, batch, layers] for layers, batch, _ in steps], residuals)
    fitted = replace(cluster, step_overhead_s=step, sequence_overhead_s=sequence, layer_overhead_s=layer)
    pairs = _LONG_PROMPT * (_LONG_PROMPT + 1) // 2
    model = CostModel(_config(LAYERS[0]), Layout(), fitted)
    known = model.step_seconds(StepShape(0, 0, _LONG_PROMPT, pairs, 1))
    return replace(fitted, token_overhead_s=max(0.0, (prompt_s - known) / _LONG_PROMPT))


def fit_ranks(
    cluster: Cluster, layout: Layout, steps: Sequence[tuple[int, int, float]]
) -> tuple[float, float]:
    """Fits the time of `steps` on `layout` beyond the prediction: seconds per step, and seconds per collective."""
    residuals = [seconds - _predicted(cluster, layout, layers, batch) for layers, batch, seconds in steps]
    ranks, collective = _non_negative([[1.0, 2.0 * layers] for layers, _, _ in steps], residuals)
    return ranks, collective


def _predicted(cluster: Cluster, layout: Layout, layers: int, batch: int) -> float:
    context = batch * (_PROMPT + _OUTPUT // 2)
    model = CostModel(_config(layers), layout, cluster)
    return model.step_seconds(StepShape(batch, context, 0, 0, batch))


def _non_negative(rows: list[list[float]], values: list[float]) -> list[float]:
    """Least squares without negative coefficients: drops the most negative column until none is left."""
    matrix, target = np.array(rows), np.array(values)
    kept = list(range(matrix.shape[1]))
    while kept:
        found = np.linalg.lstsq(matrix[:, kept], target, rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    full = [0.0] * matrix.shape[1]
    for column, value in zip(kept, found if kept else [], strict=True):
        full[column] = float(value)
    return full


def _config(layers: int) -> ModelConfig:
    return ModelConfig.from_dict({**_TINY, "num_hidden_layers": layers})


def _figures(
    layers: int, layout: Layout, device: str, batches: Sequence[int], prompt: int
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="qwen3_dist-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**_TINY, "num_hidden_layers": layers}))
        engine = Engine(
            EngineConfig(
                model=folder,
                load_format="random",
                layout=layout,
                device=device,
                executor="in_process" if layout.world == 1 else "processes",
                num_blocks=256,
                max_model_len=512,
                prefix_caching=False,
            )
        )
        try:
            warm_up(engine)
            measure(engine, Workload(2, prompt, 4))  # warm up with several sequences too
            return [measure(engine, Workload(batch, prompt, _OUTPUT, seed=batch)) for batch in batches]
        finally:
            engine.shutdown()
