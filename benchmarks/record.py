"""What every benchmark says beside its figures, and where it keeps them."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and date of this run."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    git = ["git", "-C", str(RESULTS.parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{len(models)} x {models[0]}" if models else platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
        "commit": commit + ("+changes" if dirty else ""),
    }


def microseconds(call: Callable[[], object], repeats: int, warmup: int = 20) -> dict[str, float]:
    """p50 and p99 of one `call` in microseconds."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e6)
    cuts = statistics.quantiles(samples, n=100)
    return {"p50_us": round(statistics.median(samples), 1), "p99_us": round(cuts[98], 1)}


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table and writes them, with the machine, to results/."""
    about = machine()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\t".join(columns))
    for row in rows:
        print("\t".join(str(row.get(column, "")) for column in columns))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{about['date']}.json"
    file.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(f"written to {file.relative_to(RESULTS.parent.parent)}")
