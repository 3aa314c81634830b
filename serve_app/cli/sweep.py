"""`qwen3-dist sweep`: benchmarks layouts of a model and compares the results with predictions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout, divisors, valid_layouts
from serve_app.cli.options import positive
from serve_app.cli.runnable import runnable

if TYPE_CHECKING:
    from qwen3_dist.config import ModelConfig

HELP = "benchmark layouts and write tables, charts and prediction errors"
_SERVICE_CHILD = "serve_app.load_client.sweep_child"

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="checkpoint directory; config.json or official name (random weights); or bundled",
    )
    parser.add_argument(
        "--layouts",
        required=True,
        metavar="all|L1;L2",
        help="layouts separated by ; or all that fit this machine or Ray cluster",
    )
    parser.add_argument(
        "--workload", required=True, metavar="W.yaml", help="YAML file with the points that each layout runs"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory of the results; the same command again resumes the sweep",
    )
    parser.add_argument(
        "--hardware",
        metavar="FILE.yaml",
        help="cluster file of calibrate, to compare each result with its prediction",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run layouts again that failed before")
    parser.add_argument(
        "--repeats",
        type=positive,
        metavar="N",
        help="runs of each point, of which the median counts (default: repeats of the workload)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="Ray cluster whose nodes run the ranks, as serve's do; auto is the one that runs here",
    )
    parser.add_argument(
        "--http",
        action="store_true",
        help="run each layout as a service and send the prompts as bench serve does; needs a checkpoint",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.hardware import read_cluster
    from cluster.planning.official import find_config
    from cluster.sweep.report import summary, write_report
    from cluster.sweep.rows import make_rows
    from cluster.sweep.run import ENGINE_CHILD, Place, SweepFolder, read_workload, run_sweep

    workload = read_workload(args.workload)
    if args.repeats:
        workload = dataclasses.replace(workload, repeats=args.repeats)
    place = Place(args.ray_address, args.http, _SERVICE_CHILD if args.http else ENGINE_CHILD)
    cluster = read_cluster(args.hardware) if args.hardware else None
    name, config = find_config(args.model)
    layouts = _layouts(args.layouts, config, workload.device, args.ray_address)
    folder = SweepFolder(args.out, name, workload, place)
    results = []
    try:
        with runnable(args.model, name, args.out if place.ray_address else None) as (path, random_weights):
            if args.http and random_weights:
                raise ConfigError(
                    "--http needs a checkpoint with a tokenizer, and this model would have random weights"
                )
            ran = run_sweep(
                folder, layouts, path, random_weights, workload, _report, args.retry_failed, place
            )
            for layout, result in ran:
                results.append((layout, result))
                if args.json:
                    print(json.dumps(result), file=out, flush=True)
                rows = make_rows(results, config, workload, cluster)
                written = write_report(
                    args.out, f"Layouts of {name}", rows
                )  # after each layout, in case the sweep is interrupted
    except KeyboardInterrupt:
        _report("stopped; the same command resumes the sweep")
        return INTERRUPTED
    if not args.json:
        print((args.out / "table.md").read_text(), file=out)
    for line in [*summary(rows), *(f"written: {file}" for file in written)]:
        _report(line)
    return 0


def _layouts(text: str, config: ModelConfig, device: str, ray_address: str | None) -> list[Layout]:
    if text != "all":
        layouts = [Layout.parse(part) for part in text.split(";") if part.strip()]
        if not layouts:
            raise ConfigError("--layouts is empty; write for example 'tp=1;tp=2', or all")
        for layout in layouts:
            layout.validate(config)
        return list(dict.fromkeys(layouts))
    devices = _devices_here(device) if ray_address is None else _devices_of_cluster(device, ray_address)
    return [layout for world in divisors(devices) for layout in valid_layouts(config, world)]


def _devices_here(device: str) -> int:
    from qwen3_dist.machine import cores
    from qwen3_dist.worker.cards import local_device

    if local_device(device) == "cpu":
        return cores()
    import torch

    return torch.cuda.device_count()


def _devices_of_cluster(device: str, ray_address: str) -> int:
    """GPUs of the Ray cluster; its CPUs if it has none. Raises ResourceError."""
    from cluster.ray_cluster import joined
    from qwen3_dist.launch.ray_ranks import cluster_resources

    with joined(ray_address):
        resources = cluster_resources()
    gpus = int(resources.get("GPU", 0)) if device != "cpu" else 0
    return gpus or max(1, int(resources.get("CPU", 0)))


def _report(line: str) -> None:
    print(f"qwen3-dist sweep: {line}", file=sys.stderr, flush=True)
