"""`qwen3-dist sweep`: benchmarks layouts of a model and compares the results with predictions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout, divisors, valid_layouts
from serve_app.cli.runnable import runnable

if TYPE_CHECKING:
    from qwen3_dist.config import ModelConfig

HELP = "benchmark layouts on this machine and write tables, charts and prediction errors"

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
        help="layouts separated by ; or all that fit this machine",
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


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.hardware import read_cluster
    from cluster.planning.official import find_config
    from cluster.sweep.report import make_rows, summary, write_report
    from cluster.sweep.run import SweepFolder, read_workload, run_sweep

    workload = read_workload(args.workload)
    cluster = read_cluster(args.hardware) if args.hardware else None
    name, config = find_config(args.model)
    layouts = _layouts(args.layouts, config, workload.device)
    folder = SweepFolder(args.out, name, workload)
    results = []
    try:
        with runnable(args.model, name) as (path, random_weights):
            ran = run_sweep(folder, layouts, path, random_weights, workload, _report, args.retry_failed)
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


def _layouts(text: str, config: ModelConfig, device: str) -> list[Layout]:
    if text != "all":
        layouts = [Layout.parse(part) for part in text.split(";") if part.strip()]
        if not layouts:
            raise ConfigError("--layouts is empty; write for example 'tp=1;tp=2', or all")
        for layout in layouts:
            layout.validate(config)
        return list(dict.fromkeys(layouts))
    from qwen3_dist.machine import cores
    from qwen3_dist.worker.cards import local_device

    devices = cores()
    if local_device(device) == "cuda":
        import torch

        devices = torch.cuda.device_count()
    return [layout for world in divisors(devices) for layout in valid_layouts(config, world)]


def _report(line: str) -> None:
    print(f"qwen3-dist sweep: {line}", file=sys.stderr, flush=True)
