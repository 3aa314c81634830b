"""Agreement of the simulator with the real engine and the real service, and its speed for large clusters.

    python -m benchmarks.simulator [--seconds 30] [--skip-real] [--skip-scale]
    python -m benchmarks.simulator --http [open] [loop] [scaling]

Agreement: a small random model behind `AsyncEngine` with Poisson arrivals at shares of the engine's capacity. The
simulation gets the same arrivals, and step times fitted to steps measured before and after. Speed: Qwen3-235B-A22B on
H100s at a load near their capacity.

`--http`: the service over HTTP, with steps that take as long as those of a slowed GPU and no CPU time: Poisson
arrivals at shares of its capacity, clients in a closed loop, autoscaling under a rate that rises and falls.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import keep
from benchmarks.simulator.http_agreement import open_loads
from benchmarks.simulator.http_loop import LOOPS, closed_loop
from benchmarks.simulator.http_scaling import scaling
from benchmarks.simulator.real_run import RealRun, run_for_real
from benchmarks.simulator.step_fit import FittedCost, measure_steps
from cluster.hardware import parse_gpus
from cluster.planning.cost_model import CostModel
from cluster.planning.official import find_config
from cluster.simulation.arrivals import Lengths, PoissonArrivals, Request
from cluster.simulation.autoscaler import AutoscalingConfig
from cluster.simulation.replica import ReplicaConfig
from cluster.simulation.report import Limits, summarize
from cluster.simulation.service import Outcome, ServiceSimulation, simulate
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.engine import Engine
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.settings import EngineConfig
from qwen3_dist.step_defaults import STEP_DEFAULTS

SHAPE: dict[str, Any] = {  # the proportions of Qwen3-0.6B, at half its width
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
INPUT, OUTPUT = Lengths(200, 0.5), Lengths(40, 0.5)
PREFIX_LEN, PREFIXES = 64, 4
SHARES = (0.3, 0.6, 0.8)  # of capacity
REPEATS = 1
GPUS = (64, 512, 2048)
SCALE_LAYOUT = Layout(tp=4, dp=2, ep=8)
SCALE_RATE = 5.0  # requests a second for each replica
SCALE_S = 60.0
# Each starts a service of its own.
HTTP: dict[str, list[Callable[[], list[dict[str, Any]]]]] = {
    "open": [open_loads],
    "loop": [partial(closed_loop, *loop) for loop in LOOPS],
    "scaling": [scaling],
}


def in_own_process(run: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `run` returns in a process of its own: threads of Serve's client outlive a service, and complain."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of arrivals in each real run")
    parser.add_argument("--skip-real", action="store_true", help="measure only the speed")
    parser.add_argument("--skip-scale", action="store_true", help="measure only the agreement")
    parser.add_argument(
        "--http", nargs="*", choices=tuple(HTTP), help="measure only this, by default all of it"
    )
    args = parser.parse_args()
    if args.http is not None:
        for name in args.http or HTTP:
            keep(f"simulator-http-{name}", [row for run in HTTP[name] for row in in_own_process(run)])
        return
    if not args.skip_real:
        keep("simulator-agreement", agreement(args.seconds))
    if not args.skip_scale:
        keep("simulator-scale", [scale(gpus) for gpus in GPUS])


def agreement(seconds: float) -> list[dict[str, Any]]:
    """Real and simulated figures of the same arrivals, and their ratios, at several loads."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="qwen3_dist-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        config = EngineConfig(
            model=folder, load_format="random", device="cpu", executor="in_process", num_blocks=4096
        )
        steps = measured(config, seed=0)
        for repeat in range(REPEATS):
            for share in SHARES:
                seed = 10 * repeat + int(10 * share)
                rate = share * capacity(FittedCost.of(steps), config)
                requests = list(arrivals(rate, seconds, seed))
                engine = AsyncEngine(config)
                try:
                    real = run_for_real(engine, requests, seed)
                finally:
                    engine.shutdown()
                after = measured(config, seed + 1)
                cost = FittedCost.of(steps + after)
                steps = after
                rows.append(compared(share, rate, real, simulated(cost, config, requests), cost))
                print(rows[-1], flush=True)
    return rows


def measured(config: EngineConfig, seed: int) -> list[Any]:
    engine = Engine(config)
    try:
        return measure_steps(engine, seed)
    finally:
        engine.shutdown()


def arrivals(rate: float, seconds: float, seed: int) -> PoissonArrivals:
    return PoissonArrivals((rate,), seconds, INPUT, OUTPUT, PREFIX_LEN, PREFIXES, seed)


def capacity(cost: FittedCost, config: EngineConfig) -> float:
    """Requests per second of an engine that is never idle, by the simulation."""
    outcome = simulated(cost, config, [Request(0.0, 200, 40) for _ in range(400)])
    return len(outcome.recorder.arrivals_s) / outcome.end_s


def simulated(cost: FittedCost, config: EngineConfig, requests: list[Request]) -> Outcome:
    assert config.num_blocks is not None
    limits = SchedulerLimits.of(config, "cpu", config.num_blocks)
    replica = ReplicaConfig(config.num_blocks, limits, config.block_size, depth=1)
    return simulate(ServiceSimulation(replica), cost, requests)


def compared(share: float, rate: float, real: RealRun, outcome: Outcome, cost: FittedCost) -> dict[str, Any]:
    report = summarize(outcome, Limits())
    theirs = real.figures()
    ours = {
        "output_tokens_per_s": report["output_tokens_per_s"],
        "ttft_p50_ms": report["ttft_ms"]["p50"],
        "ttft_p90_ms": report["ttft_ms"]["p90"],
        "itl_p50_ms": report["itl_ms"]["p50"],
    }
    row: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "load": share,
        "requests_per_s": round(rate, 2),
        "requests": len(real.arrivals_s),
    }
    for name, value in theirs.items():
        row[f"real_{name}"] = round(value, 1)
        row[f"simulated_{name}"] = round(ours[name], 1)
        row[f"ratio_{name}"] = round(ours[name] / value, 3)
    return {
        **row,
        "real_steps": real.steps,
        "simulated_steps": outcome.steps,
        "real_prefix_hits": real.cached_prompt_tokens,
        "simulated_prefix_hits": outcome.counts.cached_prompt_tokens,
        "fit_median_error": round(cost.median_error, 3),
    }


def scale(gpus: int) -> dict[str, Any]:
    """Simulates a minute of a service on `gpus` GPUs; wall time and events."""
    _, config = find_config("Qwen3-235B-A22B")
    cost = CostModel(config, SCALE_LAYOUT, parse_gpus(f"{gpus}xH100"))
    defaults = STEP_DEFAULTS["cuda"]
    limits = SchedulerLimits(defaults.max_num_seqs, defaults.max_num_batched_tokens)
    blocks = cost.kv_capacity_tokens(limits.max_num_batched_tokens, limits.max_num_seqs) // 16
    world, replicas = SCALE_LAYOUT.world, gpus // SCALE_LAYOUT.world
    replica = ReplicaConfig(blocks, limits, groups=SCALE_LAYOUT.dp, num_devices=world)
    simulation = ServiceSimulation(replica, AutoscalingConfig(replicas, replicas))
    requests = PoissonArrivals((SCALE_RATE * replicas,), SCALE_S, Lengths(1024, 0.5), Lengths(256, 0.5))
    report = summarize(simulate(simulation, cost, requests), Limits(ttft_ms=1000, itl_ms=50))
    figures = report["simulation"]
    return {
        "model": "Qwen3-235B-A22B",
        "layout": str(SCALE_LAYOUT),
        "gpus": gpus,
        "requests": report["requests"],
        "simulated_s": report["span_s"],
        **{name: figures[name] for name in ("wall_s", "steps", "events", "steps_per_s", "events_per_s")},
        "output_tokens_per_s": report["output_tokens_per_s"],
        "slo_attained": report["slo"]["attained"],
    }


if __name__ == "__main__":
    main()
