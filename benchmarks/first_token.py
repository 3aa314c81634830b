"""Seconds from `make demo`, in an installed environment, to its first streamed character.

python -m benchmarks.first_token
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.record import keep

ROOT = Path(__file__).parent.parent
RUNS = 3


def main() -> None:
    rows = []
    for run in range(RUNS):
        started = time.perf_counter()
        demo = subprocess.Popen(
            ["make", "--silent", "demo"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert demo.stdout is not None
        ready = question = 0.0
        for line in iter(demo.stdout.readline, b""):
            if b"is ready" in line:
                ready = time.perf_counter() - started
            if line.startswith(b"> "):
                demo.stdout.read(1)
                question = time.perf_counter() - started
                break
        demo.stdout.read()
        assert demo.wait() == 0, "make demo failed"
        ended = time.perf_counter() - started
        times = {"ready_s": ready, "first_token_s": question, "all_ended_s": ended}
        rows.append({"run": run, **{name: round(value, 1) for name, value in times.items()}})
    keep("first-token", rows)


if __name__ == "__main__":
    main()
