"""`qwen3-dist simulate`: simulates a whole service and reports its latencies, throughput and SLO attainment."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen3_dist.errors import ConfigError, ParallelLayoutError
from serve_app.cli.options import add_model_and_cluster, changed_config, given_cluster
from serve_app.cli.readable import report_lines
from serve_app.cli.simulated_layout import layout_and_reason
from serve_app.settings import IngressSettings, ScalingSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.planning.cost_model import CostModel
    from cluster.simulation.arrivals import Lengths, Request
    from cluster.simulation.service import ServiceSimulation

HELP = "simulate a service with arrivals, scheduling and autoscaling, on predicted step times"
_SERVICE = (
    dataclasses.asdict(ScalingSettings())
    | dataclasses.asdict(IngressSettings())
    | {"target_ongoing_requests": ScalingSettings().scaling_target}
)
_POISSON = ("rate", "duration", "input_len", "output_len")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_cluster(parser)
    parser.add_argument(
        "--layout",
        default="",
        metavar="L",
        help="parallel layout of a replica (default: the best that plan finds)",
    )
    _add_arrivals(parser.add_argument_group("arrivals"))
    _add_replicas(parser.add_argument_group("replicas"))
    _add_engine(parser.add_argument_group("engine of each replica"))
    limits = parser.add_argument_group("limits")
    limits.add_argument("--ttft-ms", type=float, metavar="X", help="limit of the time to first token")
    limits.add_argument(
        "--itl-ms", type=float, metavar="X", help="limit of a request's mean inter-token latency"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of arrivals and routing (default: 0)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="chart of the replicas over time")


def _add_arrivals(group: Any) -> None:
    group.add_argument("--trace", type=Path, metavar="FILE", help=".jsonl or .csv: arrival_s, input_len, ...")
    group.add_argument(
        "--rate",
        type=_rates,
        metavar="R[,R...]",
        help="requests a second, Poisson; several rates share the duration evenly, in turn",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="clients that begin together, and send a request when their last is answered, in place of --rate",
    )
    group.add_argument(
        "--num-requests", type=int, metavar="N", help="requests of all clients (default: 10 of each)"
    )
    group.add_argument("--duration", type=float, metavar="S", help="seconds during which requests arrive")
    for name, what in (("input-len", "tokens per prompt"), ("output-len", "tokens generated per prompt")):
        group.add_argument(
            f"--{name}",
            metavar="N|MEAN:CV",
            help=f"{what}: fixed, or lognormal with mean and coefficient of variation (512:0.8)",
        )
    group.add_argument(
        "--prefix-len", type=int, default=0, metavar="N", help="length of the shared prefixes in tokens"
    )
    group.add_argument("--prefixes", type=int, default=0, metavar="N", help="number of shared prefixes")


def _add_replicas(group: Any) -> None:
    group.add_argument(
        "--min-replicas", type=int, metavar="N", help="fewest replicas (default: --max-replicas)"
    )
    group.add_argument(
        "--max-replicas", type=int, metavar="N", help="most replicas (default: as many as the cluster holds)"
    )
    for name, kind, what in (
        ("target-ongoing-requests", float, "requests in flight per replica that autoscaling aims for"),
        ("upscale-delay-s", float, "seconds of high load before a replica is added"),
        ("downscale-delay-s", float, "seconds of low load before a replica is removed"),
        ("metrics-interval-s", float, "seconds between load measurements"),
        ("look-back-period-s", float, "seconds over which a scaling decision averages the load"),
    ):
        default = _SERVICE[name.replace("-", "_")]
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar="X", help=f"{what} (default: {default:g})"
        )
    group.add_argument(
        "--start-up-s",
        type=float,
        default=60.0,
        metavar="X",
        help="seconds from the decision to add a replica until it takes requests (default: 60)",
    )


def _add_engine(group: Any) -> None:
    for name, default, what in (
        ("block-size", "16", "tokens per KV-cache block"),
        ("num-blocks", "as many as fit", "KV-cache blocks per dp group"),
        ("max-num-seqs", "by device", "most sequences in one step of a dp group"),
        ("max-num-batched-tokens", "by device", "most tokens in one step of a dp group"),
        ("max-model-len", "the model's", "longest prompt plus output"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: {default})")
    group.add_argument("--no-prefix-caching", action="store_true", help="do not reuse cached prefixes")
    group.add_argument(
        "--no-overlap", action="store_true", help="schedule a step only after the previous one has ended"
    )
    group.add_argument(
        "--expert-imbalance",
        type=float,
        metavar="X",
        help="load of the busiest expert-parallel rank over the mean (default: fitted)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.planning.cost_model import CostModel
    from cluster.planning.expected_errors import expected_error
    from cluster.planning.experts import EXPERT_IMBALANCE
    from cluster.planning.memory import kv_item_bytes
    from cluster.simulation.report import Limits, plot_replicas, summarize
    from cluster.simulation.service import simulate

    name, config = changed_config(args)
    cluster = given_cluster(args)
    layout, chosen = layout_and_reason(args, config, cluster)
    limits = Limits(args.ttft_ms, args.itl_ms)
    if args.plot:
        from cluster.planning.plots import require_matplotlib

        require_matplotlib()
    imbalance = EXPERT_IMBALANCE if args.expert_imbalance is None else args.expert_imbalance
    kept = kv_item_bytes(config, args.kv_cache_dtype)
    cost = CostModel(config, layout, cluster, imbalance, kv_bytes=kept)
    simulation = _simulation(args, cost)
    requests = _with_progress(_requests(args, simulation.replica.longest), args)
    outcome = simulate(simulation, cost, requests)
    error = expected_error(config, cluster, layout.world)
    report = {
        "model": name,
        "layout": str(layout),
        "layout_is": chosen,
        "cluster": f"{cluster.num_devices} x {cluster.device.name}",
        "num_blocks": simulation.replica.num_blocks,
        **summarize(outcome, limits),
    }
    if args.json:
        print(json.dumps(report | {"expected_error": error and error.as_json()}), file=out)
    else:
        print(
            "\n".join([*report_lines(_without_history(report)), *([str(error)] if error else [])]), file=out
        )
    if args.plot:
        plot_replicas(args.plot, f"{name} with {layout} on {report['cluster']}", outcome)
    return 0


def _simulation(args: argparse.Namespace, cost: CostModel) -> ServiceSimulation:
    """The service that the command line describes. Raises ConfigError or ParallelLayoutError if it is not possible."""
    from cluster.simulation.autoscaler import AutoscalingConfig
    from cluster.simulation.service import ServiceSimulation

    most_that_fit = _most_replicas(cost)
    max_replicas = most_that_fit if args.max_replicas is None else args.max_replicas
    scaling = AutoscalingConfig(
        max_replicas if args.min_replicas is None else args.min_replicas,
        max_replicas,
        args.target_ongoing_requests,
        args.upscale_delay_s,
        args.downscale_delay_s,
        args.metrics_interval_s,
        args.look_back_period_s,
    )
    return ServiceSimulation(
        _replica(args, cost),
        scaling,
        args.start_up_s,
        most_that_fit * cost.layout.world,
        args.seed,
        cost.cluster.request_overhead_s,
        cost.cluster.request_token_overhead_s,
    )


def _most_replicas(cost: CostModel) -> int:
    """Replicas that fit into the cluster. Raises ParallelLayoutError if none does."""
    layout, cluster = cost.layout, cost.cluster
    if layout.tp > 1 and cluster.devices_per_node % layout.tp:
        raise ParallelLayoutError(
            f"tp={layout.tp} does not fit into nodes of {cluster.devices_per_node} devices; "
            "take a tp that divides them"
        )
    replicas = cluster.replicas(layout.world)
    if replicas < 1:
        raise ParallelLayoutError(
            f"layout {layout} needs {layout.world} devices and the cluster has {cluster.num_devices}; "
            "take a smaller layout or more devices"
        )
    return replicas


def _replica(args: argparse.Namespace, cost: CostModel) -> Any:
    from cluster.simulation.replica import ReplicaConfig
    from qwen3_dist.protocol.step_limits import SchedulerLimits
    from qwen3_dist.settings import EngineConfig

    given = {
        name: getattr(args, name)
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        if getattr(args, name) is not None
    }
    engine = EngineConfig(**given)
    device = cost.cluster.device_kind
    wanted = SchedulerLimits.of(engine, device, sys.maxsize)
    capacity = cost.kv_capacity_tokens(wanted.max_num_batched_tokens, wanted.max_num_seqs)
    num_blocks = engine.num_blocks or capacity // engine.block_size
    if capacity < num_blocks * engine.block_size or num_blocks < 1:
        raise ConfigError(
            f"the weights of layout {cost.layout} leave room for {max(0, capacity)} tokens of KV cache on a rank "
            f"of {cost.device.memory_bytes / 1e9:.0f} GB; take a layout of more ranks or fewer blocks"
        )
    return ReplicaConfig(
        num_blocks,
        SchedulerLimits.of(engine, device, num_blocks),
        engine.block_size,
        not args.no_prefix_caching,
        cost.layout.dp,
        1 if args.no_overlap else 2,
        cost.layout.world,
        min(cost.config.context_length, engine.max_model_len or cost.config.context_length),
    )


def _requests(args: argparse.Namespace, longest: int) -> Iterable[Request]:
    from cluster.simulation.arrivals import Lengths, PoissonArrivals
    from cluster.simulation.trace import read_trace

    given = [name for name in _POISSON if getattr(args, name) is not None]
    if args.trace:
        for name in (*_POISSON, "concurrency", "num_requests", "prefix_len", "prefixes"):
            if not getattr(args, name):
                continue
            raise ConfigError(f"--trace already defines the requests; leave --{_flag(name)} out")
        return read_trace(args.trace, longest)
    needed = _POISSON if args.concurrency is None else _POISSON[2:]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ConfigError(f"--{_flag(missing[0])} is missing; give --trace, or {_all_flags(needed)}")
    inputs, outputs = Lengths.parse(args.input_len), Lengths.parse(args.output_len)
    if inputs.mean + outputs.mean > longest:
        raise ConfigError(
            f"{inputs.mean:g} + {outputs.mean:g} tokens exceed the {longest} that one sequence may have; "
            "lower --input-len or --output-len"
        )
    if args.concurrency is not None:
        return _closed_loop(args, inputs, outputs)
    if args.num_requests is not None:
        raise ConfigError(
            "--num-requests is of a closed loop; leave it out, since --rate and --duration say how many requests come"
        )
    return PoissonArrivals(
        args.rate, args.duration, inputs, outputs, args.prefix_len, args.prefixes, args.seed
    )


def _closed_loop(args: argparse.Namespace, inputs: Lengths, outputs: Lengths) -> Iterable[Request]:
    from cluster.planning.clients import REQUESTS_EACH
    from cluster.simulation.arrivals import ClosedLoop

    for name in ("rate", "duration", "prefix_len", "prefixes"):
        if getattr(args, name):
            raise ConfigError(
                f"--concurrency is a closed loop, which has no --{_flag(name)}; leave one of them out"
            )
    number = REQUESTS_EACH * args.concurrency if args.num_requests is None else args.num_requests
    return ClosedLoop(args.concurrency, number, inputs, outputs, args.seed)


def _with_progress(requests: Iterable[Request], args: argparse.Namespace) -> Iterable[Request]:
    """`requests`, with a progress bar of their arrival times if stderr is a terminal and they are known."""
    if args.concurrency is not None:
        return requests
    return _shown_by_arrivals(requests, args)


def _shown_by_arrivals(requests: Iterable[Request], args: argparse.Namespace) -> Iterable[Request]:
    from qwen3_dist.progress import progress_bar

    last_s = requests[-1].arrival_s if isinstance(requests, list) else args.duration
    with progress_bar(sys.stderr.isatty(), desc="simulating", unit="s", total=round(last_s, 1)) as bar:
        for request in requests:
            if request.arrival_s - bar.n >= 1:
                bar.update(int(request.arrival_s - bar.n))
            yield request


def _without_history(report: dict[str, Any]) -> dict[str, Any]:
    """`report` without the numbers of replicas over time, which --plot shows."""
    replicas = {name: value for name, value in report["replicas"].items() if name != "over_time"}
    return {**report, "replicas": replicas}


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a rate or a list of rates, such as 4 or 2,8,2"
        ) from None


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _all_flags(names: tuple[str, ...]) -> str:
    flags = [f"--{_flag(name)}" for name in names]
    return f"{', '.join(flags[:-1])} and {flags[-1]}"
