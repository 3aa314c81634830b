"""The process in which `sweep --http` runs one layout: as a service, asked by the client of `bench serve`."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import Any

from cluster.sweep.child import Job, answer, measured, read_job
from cluster.sweep.run import SweepPoint
from qwen3_dist.errors import ResourceError
from qwen3_dist.layout import Layout
from serve_app.launch.foreground import running_service
from serve_app.load_client.bench import LoadOptions, measure
from serve_app.settings import read_service_config

_PERCENTS = (90.0, 99.0)
_SPARE_TOKENS = 8  # of the context, for special tokens


def run(job: Job) -> dict[str, Any]:
    """The figures of each repeat of each point, as `cluster.sweep.child.run` returns them."""
    workload = read_job(job)
    engine = workload.engine_config(job["model"], False, Layout.parse(job["layout"]))
    assert engine.max_model_len is not None
    settings = {
        "model": engine.model,
        "layout": str(engine.layout),
        "device": engine.device,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len + _SPARE_TOKENS,
        "prefix_caching": False,
        "host": "127.0.0.1",
        "port": _free_port(),
    }
    if engine.max_num_batched_tokens is not None:
        settings["max_num_batched_tokens"] = engine.max_num_batched_tokens
    with running_service(read_service_config(settings), job["ray_address"]) as service:
        return measured(workload, lambda point, seed: _figures(service.url, point, seed))


def _figures(url: str, point: SweepPoint, seed: int) -> dict[str, Any]:
    options = LoadOptions(
        url,
        num_prompts=point.num_prompts,
        random_input_len=point.input_len,
        random_output_len=point.output_len,
        request_rate=point.rate or math.inf,
        seed=seed,
        num_warmups=1,
        metric_percentiles=_PERCENTS,
    )
    result, _ = asyncio.run(measure(options))
    if not result["completed"]:
        raise ResourceError(f"no request of {point} was answered: {result['first_error']}")
    return {
        "output_tokens_per_s": result["output_throughput"],
        "total_tokens_per_s": result["total_token_throughput"],
        "ttft_ms": _percentiles(result, "ttft"),
        "itl_ms": _percentiles(result, "itl") if point.output_len > 1 else None,
        **{name: result[name] for name in ("completed", "failed", "first_error")},
    }


def _percentiles(result: dict[str, Any], metric: str) -> dict[str, float]:
    shares = {f"p{percent:g}": result[f"p{percent:g}_{metric}_ms"] for percent in _PERCENTS}
    return {"p50": result[f"median_{metric}_ms"], **shares}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    answer(run)
