"""The options of `qwen3-dist plan`, and what they say: load, GPUs and prices."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.step_defaults import STEP_DEFAULTS
from serve_app.cli import plan_deployment
from serve_app.cli.options import add_model_and_cluster, number
from serve_app.cli.parser import VerbParser

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.gpu_kinds import GpuKind
    from cluster.planning.planner import PlanRequest

_GPUS = (
    "number and kind of GPUs, on nodes of 8, or nodes x GPUs of each x kind; a kind alone, as H100, finds the fewest "
    "that serve --rate; H100,H200 or 8xH100,4xH200 compares kinds"
)
# What --compare has no use for.
_OF_A_PLAN = (
    "input_len", "output_len", "ttft_ms", "itl_ms", "price", "plot", "all", "disaggregated",
    "render", "out", "prefix_hits", "drafted", "acceptance", "lora_rank", "adapters",
)  # fmt: skip


def add_arguments(parser: VerbParser) -> None:
    add_model_and_cluster(parser, gpus_help=_GPUS)
    load = add_load(parser.add_argument_group("load"))
    load.add_argument(
        "--compare",
        nargs="+",
        metavar="RESULT.json",
        help="loads of results of bench serve --save-result, which are shown beside their predictions",
    )
    add_engine(parser.add_argument_group("engine of each replica"))
    _add_answers(parser.add_argument_group("further answers"))
    plan_deployment.add_arguments(parser)
    parser.add_argument(
        "--layout",
        metavar="L",
        help="the only layout to plan for (default: all), or that --compare measured (default: the best for the first "
        "result)",
    )
    parser.require_without("--compare", "--input-len", "--output-len")


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that are missing or contradict each other."""
    if args.compare:
        given = [name for name in _OF_A_PLAN if getattr(args, name) not in (None, False)]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise ConfigError(
                f"--compare takes the load from RESULT.json and prints no plan; leave {option} out"
            )
        return
    if args.out is not None and not args.render:
        raise ConfigError("--out is the file of --render; add --render serve, or leave --out out")


def given_kinds(args: argparse.Namespace) -> list[GpuKind]:
    """The clusters to plan for. Raises ConfigError for what cannot be read or does not go with other options."""
    from cluster.hardware import read_cluster
    from cluster.planning.gpu_kinds import GpuKind, parse_kinds

    kinds = [GpuKind(read_cluster(args.cluster))] if args.cluster else parse_kinds(args.gpus)
    one = len(kinds) == 1 and kinds[0].sized
    if args.compare and not one:
        raise ConfigError(
            f"--compare needs the GPUs that were measured, as in --gpus 8xH100, not {args.gpus}"
        )
    if not kinds[0].sized and args.rate is None:
        raise ConfigError(
            f"--gpus {args.gpus} has no number of GPUs; write 8x{kinds[0].name}, or give --rate to find the fewest"
        )
    if args.plot and not one:
        raise ConfigError("--plot draws the layouts of one cluster; give --gpus one kind with a number")
    return kinds


def given_prices(args: argparse.Namespace, kinds: list[GpuKind]) -> dict[str, float]:
    """The price of a GPU-hour of each kind; empty without --price. Raises ConfigError."""
    from cluster.planning.prices import read_prices

    return read_prices(args.price, list(dict.fromkeys(kind.name for kind in kinds))) if args.price else {}


def given_request(args: argparse.Namespace, cluster: Cluster) -> PlanRequest:
    """The load and the limits. What a rate or results of a measurement decide has a value of no meaning."""
    from cluster.planning.planner import PlanRequest

    names = [field.name for field in dataclasses.fields(PlanRequest)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.layout is not None:
        given["layout"] = Layout.parse(args.layout)
    given.setdefault("max_num_batched_tokens", STEP_DEFAULTS[cluster.device_kind].max_num_batched_tokens)
    for name in ("input_len", "output_len", "concurrency"):
        given.setdefault(name, 1)
    return PlanRequest(**given)


def add_load(group: argparse._ArgumentGroup, required: bool = False) -> argparse._MutuallyExclusiveGroup:
    """Lengths, limits, and one of a closed and an open loop; the group of these is returned. `required`: the lengths
    must be given."""
    for name, what in (("input", "in each prompt"), ("output", "generated for each prompt")):
        group.add_argument(f"--{name}-len", type=int, required=required, metavar="N", help=f"tokens {what}")
    load = group.add_mutually_exclusive_group(required=True)
    load.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests in flight in the whole cluster, each replaced when it ends",
    )
    load.add_argument(
        "--rate",
        type=number(0, 1e9, above=True),
        metavar="R",
        help="requests a second that arrive, whenever others end",
    )
    for name, what in (("ttft", "time to first token"), ("itl", "inter-token latency")):
        group.add_argument(f"--{name}-ms", type=float, metavar="X", help=f"upper limit of the mean {what}")
    return load


def add_engine(group: argparse._ArgumentGroup) -> None:
    """What changes the steps."""
    cpu, gpu = (STEP_DEFAULTS[kind].max_num_batched_tokens for kind in ("cpu", "cuda"))
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help=f"most tokens in one step (default: {gpu}; {cpu} on CPU)",
    )
    group.add_argument(
        "--expert-imbalance",
        type=float,
        metavar="X",
        help="load of the busiest expert-parallel rank over the mean (default: fitted)",
    )
    group.add_argument(
        "--prefix-hits",
        type=number(0, 1),
        metavar="SHARE",
        help="share of the prompts' tokens that the prefix cache holds (default: 0)",
    )
    group.add_argument(
        "--lora-rank", type=int, metavar="R", help="rank of adapters on all linear layers but experts"
    )
    group.add_argument("--adapters", type=int, metavar="N", help="adapters that a step uses (default: 1)")
    group.add_argument("--drafted", type=int, metavar="K", help="tokens that speculation drafts in a step")
    group.add_argument(
        "--acceptance",
        type=number(0, 1),
        metavar="SHARE",
        help="share of the drafted tokens that is accepted",
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--price",
        metavar="P|KIND=P,...|FILE.yaml",
        help="price of a GPU-hour: 2.5 of the one kind, H100=2.5,H200=3.5, or a file with a line `H100: 2.5` each",
    )
    group.add_argument(
        "--disaggregated",
        action="store_true",
        help="also plan prefill and decode on different replicas; planned only: qwen3-dist cannot run this yet",
    )
    group.add_argument(
        "--all", action="store_true", help="also list layouts that do not fit, as --json always does"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="chart of throughput per GPU over speed per user"
    )
