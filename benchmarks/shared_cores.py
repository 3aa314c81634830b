"""CPU replicas that share the cores of a host: output tokens/s with default and with fixed numbers of threads.

    python -m benchmarks.shared_cores [--clients 32] [--seconds 5] [--turns 5]

Three cases: one replica, two replicas, and one replica beside a busy loop for each core. A replica is an engine of
the bundled model with its rank in a process of its own, as `serve` starts it. All variants are loaded first
and measured alternately, so that other load affects all alike. Run it on an idle machine. The ratio of the best fixed
number of threads over the default should be below 1.3 in each case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.record import keep

INPUT_LEN, OUTPUT_LEN = 16, 16
CASES = {"one replica": (1, False), "two replicas": (2, False), "one beside busy loops": (1, True)}
_BUSY = "while True: pass"


class Replica:
    """A process with an engine, which generates for a time on request."""

    def __init__(self, settings: dict[str, Any], clients: int) -> None:
        command = [sys.executable, "-m", "benchmarks.shared_cores", "--replica", json.dumps(settings)]
        self.process = subprocess.Popen(
            [*command, "--clients", str(clients)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, seconds: float) -> None:
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)

    def rate(self) -> float:
        """Waits for tokens/s of the last `begin`. The first call waits until the engine is ready and returns 0.0."""
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())


def replica(settings: dict[str, Any], clients: int) -> None:
    """Main function of a replica's process: prints a rate for each number of seconds read from stdin."""
    from qwen3_dist import LLM, SamplingParams

    params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0, ignore_eos=True)
    prompts = [[100 + client, *range(200, 199 + INPUT_LEN)] for client in range(clients)]
    with LLM(device="cpu", executor="processes", num_blocks=2048, use_tqdm=False, **settings) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        print(0.0, flush=True)
        for line in sys.stdin:
            started, tokens = time.perf_counter(), 0
            while time.perf_counter() - started < float(line):
                llm.generate(prompts, params, use_tqdm=False)
                tokens += clients * OUTPUT_LEN
            print(tokens / (time.perf_counter() - started), flush=True)


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """A context in which `count` processes run busy loops."""
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.send_signal(signal.SIGKILL)
            loop.wait()


def measured(clients: int, seconds: float, turns: int) -> dict[tuple[str, str], list[float]]:
    """Total tokens/s of the replicas of each case and number of threads, for each turn."""
    cores = len(os.sched_getaffinity(0))
    fixed = sorted({1, *(1 << bit for bit in range(cores.bit_length()) if 1 << bit <= cores), cores})
    variants: dict[tuple[str, str], list[Replica]] = {}
    for case, (count, _) in CASES.items():
        settings = {"default": {"ranks_per_host": count}} | {str(n): {"threads_per_rank": n} for n in fixed}
        for threads, setting in settings.items():
            variants[case, threads] = [Replica(setting, clients) for _ in range(count)]
            for each in variants[case, threads]:
                each.rate()
    rates = defaultdict(list)
    for _ in range(turns):
        for (case, threads), replicas in variants.items():
            with busy_loops(cores if CASES[case][1] else 0):
                for each in replicas:
                    each.begin(seconds)
                rates[case, threads].append(sum(each.rate() for each in replicas))
    for replicas in variants.values():
        for each in replicas:
            assert each.process.stdin is not None
            each.process.stdin.close()
            each.process.wait()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replica:
        replica(json.loads(args.replica), args.clients)
        return
    rates = measured(args.clients, args.seconds, args.turns)
    best = {case: max(statistics.median(rates[key]) for key in rates if key[0] == case) for case in CASES}
    rows = [
        {
            "case": case,
            "threads": threads,
            "tokens_per_s": round(statistics.median(found)),
            "turns": [round(rate) for rate in found],
            "best_over_this": round(best[case] / max(statistics.median(found), 1e-9), 2),
        }
        for (case, threads), found in rates.items()
    ]
    keep("shared-cores", rows)


if __name__ == "__main__":
    main()
