"""`qwen3-dist calibrate`: measures this machine for the cost model and writes a cluster file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

from qwen3_dist.errors import ConfigError, ResourceError

HELP = "measure this machine's rates and overheads and write a cluster file for plan, simulate and sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FILE.yaml", help="cluster file to write (default: stdout)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what to measure; auto: the GPUs if there are any, else the CPU",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="Ray cluster of such machines, of which two are measured for the link between nodes; auto is the one "
        "that runs here",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="measure even if other programs disturb it, and write what comes out",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    if args.out and not args.out.parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no directory {args.out.parent}")
    from cluster.calibration.calibrate import calibrate
    from cluster.calibration.noise import machine_noise
    from cluster.hardware import as_dict
    from qwen3_dist.worker.cards import local_device

    device = local_device(args.device)
    if disturbed := machine_noise().too_much:
        if not args.force:
            raise ResourceError(disturbed)
        _report(disturbed)
    found = calibrate(device, _report, ray_address=args.ray_address)
    if args.out:
        found.write(args.out)
        _report(f"written to {args.out}")
    if args.json:
        result = {"cluster": as_dict(found.cluster), "measured": found.measured, **found.about}
        print(json.dumps(result), file=out)
    elif not args.out:
        import yaml

        print(yaml.safe_dump(as_dict(found.cluster), sort_keys=False, default_flow_style=None), file=out)
    return 0


def _report(line: str) -> None:
    print(f"qwen3-dist calibrate: {line}", file=sys.stderr, flush=True)
