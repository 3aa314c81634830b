"""Stores benchmark results: one JSON file for each kind of benchmark and kind of machine.

Files are named `results/KIND-MACHINE.json`, for example `kernels-zen5-2cores.json`. A new run replaces the file of
its kind and machine. Every file has `kind`, `date`, `hardware` and `versions`, then the figures.
`benchmarks.results_index` lists them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import host_seconds
from qwen3_dist.percentiles import percentile

RESULTS = Path(__file__).parent / "results"
_AMD_GENERATIONS = {25: "zen4", 26: "zen5"}  # CPU family: generation, for CPUs with AVX-512


def run_info() -> dict[str, Any]:
    """Date, hardware, versions and commit of this run."""
    from qwen3_dist.machine import (  # imported here, since client processes should not load torch
        hardware,
        versions,
    )

    return {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions()}


def machine_name(hardware: dict[str, Any], on_gpu: bool = False) -> str:
    """The MACHINE part of file names, for example `zen5-2cores`, `intel-amx-2cores` or, for GPU runs, `1xH200`."""
    if on_gpu:
        gpus = hardware["gpus"]
        return f"{len(gpus)}x{gpus[0].removeprefix('NVIDIA ').replace(' ', '-')}"
    units = hardware.get("vector_units", ())
    vendor = next((name for name in ("AMD", "Intel") if name in hardware["cpu"]), "cpu").lower()
    generation = _AMD_GENERATIONS.get(hardware.get("cpu_family", 0)) if vendor == "amd" else None
    if generation is None or "avx512f" not in units:
        widest = next((unit for unit in ("amx", "avx512", "avx2") if any(unit in each for each in units)), "")
        generation = "-".join(filter(None, (vendor, widest)))
    return f"{generation}-{hardware['cores']}cores"


def result_file(kind: str, hardware: dict[str, Any], on_gpu: bool = False) -> Path:
    """The result file of this kind of benchmark on this machine."""
    return RESULTS / f"{kind}-{machine_name(hardware, on_gpu)}.json"


def write(kind: str, about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Writes the result file of a CPU run, with `about` from `run_info`, and updates the index."""
    from benchmarks.results_index import write_index

    file = result_file(kind, about["hardware"])
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps({"kind": kind, **about, **figures}, indent=1) + "\n")
    write_index()
    print(f"written to {file.relative_to(RESULTS.parent.parent)}")


def keep(kind: str, rows: list[dict[str, Any]]) -> None:
    """Prints `rows` as a table and writes them to the result file."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\t".join(columns))
    for row in rows:
        print("\t".join(str(row.get(column, "")) for column in columns))
    write(kind, run_info(), {"rows": rows})


def microseconds(call: Callable[[], object], repeats: int, warmup: int = 20) -> dict[str, float]:
    """p50 and p99 of the time of `call` in microseconds."""
    for _ in range(warmup):
        call()
    samples = sorted(host_seconds(call, repeats))
    return {f"p{percent}_us": round(1e6 * percentile(samples, percent), 1) for percent in (50, 99)}
