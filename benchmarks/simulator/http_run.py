"""What clients of a service see over HTTP: `qwen3-dist bench serve` with given requests."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.simulation.arrivals import ClosedLoop, Lengths, Request
from qwen3_dist.percentiles import percentile
from qwen3_dist.weights.source import bundled_path

WARMUPS = 4


@dataclass(frozen=True)
class Seen:
    """Requests as they were sent, with the times of their first and last tokens and all gaps between tokens; seconds
    from the first request, which was sent at `began_s` of this machine's clock."""

    began_s: float
    requests: list[Request]
    first_s: list[float]
    last_s: list[float]
    gaps_s: list[float]

    @classmethod
    def of(cls, result: dict[str, Any]) -> Seen:
        """Reads a result file of `bench serve --save-detailed`. Raises AssertionError if a request failed."""
        assert not any(result["errors"]), next(filter(None, result["errors"]))
        starts = result["start_times"]
        sent = [start - min(starts) for start in starts]
        lengths = zip(result["input_lens"], result["output_lens"], strict=True)
        requests = [Request(at, *each) for at, each in zip(sent, lengths, strict=True)]
        return cls(
            min(starts),
            requests,
            [at + ttft for at, ttft in zip(sent, result["ttfts"], strict=True)],
            [at + latency for at, latency in zip(sent, result["latencies"], strict=True)],
            [gap for gaps in result["itls"] for gap in gaps],
        )

    @property
    def ttfts_ms(self) -> list[float]:
        return [
            1e3 * (first - each.arrival_s) for first, each in zip(self.first_s, self.requests, strict=True)
        ]

    @property
    def tpots_ms(self) -> list[float]:
        """Mean time between two tokens of each request; 0 of those with one token."""
        return [
            1e3 * (last - first) / max(1, each.output_len - 1)
            for first, last, each in zip(self.first_s, self.last_s, self.requests, strict=True)
        ]

    def figures(self) -> dict[str, float]:
        """Latencies in ms, and tokens a second until the last request ends."""
        ttft = sorted(self.ttfts_ms)
        return {
            "ttft_p50_ms": percentile(ttft, 50),
            "ttft_p90_ms": percentile(ttft, 90),
            "itl_p50_ms": 1e3 * percentile(sorted(self.gaps_s), 50),
            "tokens_per_s": sum(each.output_len for each in self.requests) / max(self.last_s),
        }


def bench(url: str, requests: Sequence[Request], concurrency: int | None = None) -> Seen:
    """Sends `requests` to the service at `url` when they arrive, at most `concurrency` at a time."""
    with tempfile.TemporaryDirectory(prefix="qwen3_dist-") as folder:
        trace = Path(folder) / "trace.jsonl"
        trace.write_text("".join(json.dumps(_line(request)) + "\n" for request in requests))
        options = (
            f"--dataset-name trace --num-warmups {WARMUPS} --temperature 0 --save-result --save-detailed"
        )
        files = [
            f"--dataset-path={trace}",
            f"--tokenizer={bundled_path()}",
            f"--result-dir={folder}",
            "--result-filename=result.json",
        ]
        limit = [f"--max-concurrency={concurrency}"] if concurrency else []
        command = [sys.executable, "-m", "serve_app", "bench", "serve", url, *options.split(), *files, *limit]
        subprocess.run(command, check=True, capture_output=True)
        return Seen.of(json.loads((Path(folder) / "result.json").read_text()))


def _line(request: Request) -> dict[str, float]:
    return {
        "timestamp": 1e3 * request.arrival_s,
        "input_length": request.input_len,
        "output_length": request.output_len,
    }


class GivenLoop(ClosedLoop):
    """A closed loop of clients whose requests have given lengths, in the order in which they are sent."""

    def __init__(self, clients: int, requests: Sequence[Request]) -> None:
        super().__init__(clients, len(requests), Lengths(1), Lengths(1))
        self._given = iter(requests)

    def after(self, now_s: float, answered: int) -> Iterator[Request]:
        for request in islice(self._given, answered):
            yield Request(now_s, request.input_len, request.output_len)
