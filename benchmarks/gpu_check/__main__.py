"""Checks in stages that this project works on this machine's GPUs, and measures its speed; ends with a verdict.

    python -m benchmarks.gpu_check [--stages parity,graphs,rates,experts,codes,faults,nccl] [--device cpu]

The whole run takes at most twelve minutes on one GPU. `--device cpu` runs the same code on smaller sizes.
Exit code: 0 all passed, 1 a check failed or was not reached, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_check.report import PASSED, StageReport, exit_code, verdict
from benchmarks.gpu_check.supervisor import Stage, run_stage
from benchmarks.record import result_file

_NEEDED = ("torch", "safetensors", "tokenizers", "jinja2")
_MACHINE = Stage(
    "machine",
    "benchmarks.gpu_check.machine",
    cuda_s=60,
    cpu_s=60,
    advice="follow the line above; no other stage was run.",
)
_ADVICE = "report it with the JSON file; --stages {0} --only WORDS runs one check again."
STAGES = (
    Stage("parity", "benchmarks.gpu_check.parity", 210, 150, _ADVICE.format("parity")),
    Stage("graphs", "benchmarks.gpu_check.graphs", 80, 90, _ADVICE.format("graphs")),
    Stage("rates", "benchmarks.gpu_check.rates", 160, 120, _ADVICE.format("rates")),
    Stage("experts", "benchmarks.gpu_check.experts", 70, 90, _ADVICE.format("experts")),
    Stage("codes", "benchmarks.gpu_check.codes", 120, 90, _ADVICE.format("codes")),
    Stage("faults", "benchmarks.gpu_check.faults", 70, 90, _ADVICE.format("faults")),
    Stage("nccl", "benchmarks.gpu_check.nccl", 300, 150, _ADVICE.format("nccl")),
)


class _Parser(argparse.ArgumentParser):
    """Reports errors in one sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"gpu_check: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line. Returns the exit code."""
    options = _parser().parse_args(argv)
    if options.out is not None and not options.out.parent.is_dir():
        _parser().error(f"--out {options.out} is in a directory that does not exist; make it first")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        _parser().error(
            f"{sys.executable} has no {' and no '.join(missing)}; install the packages, or use another interpreter: "
            "make gpu-check GPU_PYTHON=python3.12"
        )
    started = time.monotonic()
    reports: list[StageReport] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:

        def run(stage: Stage) -> StageReport:
            limit_s = stage.limit_s(options.device) * options.time_factor
            print(f"{stage.name}: at most {limit_s:g} s", flush=True)
            report = run_stage(
                stage, options.device, Path(folder), options.layers, options.only, options.time_factor
            )
            print(f"{stage.name} {report.status}: {report.summary}", flush=True)
            return report

        machine = run_stage(_MACHINE, options.device, Path(folder))
        if machine.status != PASSED:
            print(verdict("this machine", [machine]))
            return 1
        whole = options.stages == STAGES and not options.only
        kind = (
            "gpu-check" if whole else "gpu-check-part"
        )  # a partial run must not replace the file of a whole one
        about = {
            "kind": kind,
            "date": time.strftime("%Y-%m-%d"),
            "device": options.device,
            **machine.checks[0].figures,
        }
        out = options.out or result_file(kind, about["hardware"], on_gpu=options.device == "cuda")
        try:
            for stage in options.stages:
                reports.append(run(stage))
                _write(out, about, reports)
        except KeyboardInterrupt:
            print(f"ended by Ctrl-C after {len(reports)} of {len(options.stages)} stages")
    if options.only and not any(report.checks for report in reports):
        _parser().error(f"no check has {options.only!r} in its name; a run without --only prints all names")
    took = f"{time.monotonic() - started:.0f} s"
    about_run = f"{_card(about)}, commit {about['versions']['commit']}, {took}"
    print(verdict(about_run, reports, _shown(out), on_gpu=options.device == "cuda"))
    return exit_code(reports) or int(len(reports) < len(options.stages))


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = _Parser(prog="gpu_check", description=lines[0], epilog=" ".join(lines[4:]))
    names = ",".join(stage.name for stage in STAGES)
    parser.add_argument(
        "--stages", type=_stages, default=STAGES, metavar="NAMES", help=f"some of {names}; default: all"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="run only checks whose name contains this text"
    )
    parser.add_argument(
        "--time-factor",
        type=_positive(float),
        default=1.0,
        metavar="X",
        help="factor for the time limits of stages",
    )
    parser.add_argument(
        "--layers", type=_positive(int), default=24, metavar="N", help="layers of the Qwen3-30B-A3B model"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file; default: benchmarks/results/gpu-check-MACHINE.json, or gpu-check-part-MACHINE.json",
    )
    return parser


def _stages(names: str) -> tuple[Stage, ...]:
    known = {stage.name: stage for stage in STAGES}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        named = f"there is no stage {unknown[0]!r}" if unknown else "no stage is named"
        raise argparse.ArgumentTypeError(f"{named}; the stages are {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(wanted))


def _positive(kind: type) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
        return value

    return read


def _card(about: dict[str, Any]) -> str:
    return about["cards"][0]["name"] if about.get("cards") else "cpu"


def _write(out: Path, about: dict[str, Any], reports: Sequence[StageReport]) -> None:
    stages = [report.as_json() for report in reports]
    temporary = out.with_suffix(".part")  # written atomically, in case the run is killed
    temporary.write_text(json.dumps({**about, "stages": stages}, indent=1) + "\n")
    temporary.replace(out)


def _shown(out: Path) -> str:
    here = Path.cwd()
    return str(out.relative_to(here) if out.is_absolute() and out.is_relative_to(here) else out)


if __name__ == "__main__":
    raise SystemExit(main())
