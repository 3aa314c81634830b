"""How much other programs disturb measurements on this machine."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

BUSY = 0.05  # of the cores' time, used by others: beyond it figures are unreliable
_TOO_BUSY = 0.25  # of it: beyond it they are wrong
_TOO_UNEVEN = 2.0  # times the lower quartile: the 90th percentile of equal computations
_COLUMNS = 384  # of the probe's matrices, which take a few milliseconds


@dataclass(frozen=True)
class Noise:
    """share_of_others: of the cores' time, what other programs used. spread: the 90th percentile of the times of one
    computation on all cores over their lower quartile; 1 on a machine that does nothing else."""

    share_of_others: float
    spread: float

    @property
    def too_much(self) -> str:
        """Why nothing can be measured now, and what to do; empty if it can."""
        reasons = []
        if self.share_of_others > _TOO_BUSY:
            reasons.append(f"other programs use {self.share_of_others:.0%} of the cores")
        if self.spread > _TOO_UNEVEN:
            reasons.append(
                f"the same computation takes up to {self.spread:.1f} times as long from time to time"
            )
        if not reasons:
            return ""
        return (
            f"{' and '.join(reasons)}, so overheads would be measured many times too high; stop other programs (see "
            "`top`), or the limit of this container's CPU time, and calibrate again; --force measures all the same"
        )


def machine_noise(seconds: float = 1.0) -> Noise:
    """Measures for so many seconds, with torch's threads."""
    matrix = torch.rand(_COLUMNS, _COLUMNS)
    times: list[float] = []
    usage, begun = CpuUsage(), time.perf_counter()
    while len(times) < 10 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    quartile = statistics.quantiles(times, n=4, method="inclusive")[0]
    return Noise(
        usage.share_of_others(), statistics.quantiles(times, n=10, method="inclusive")[-1] / quartile
    )


class CpuUsage:
    """CPU time of the cores that this process may use, since the object was constructed."""

    def __init__(self) -> None:
        self._before = self._now()

    def share_of_others(self) -> float:
        """Share of the cores' time that was used by others than this process and its ended children."""
        total, idle, own = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return max(0.0, (total - idle - own) / total) if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        cores = [[int(part) for part in words[1:9]] for words in lines if words[0] in names]
        ticks = [sum(column) for column in zip(*cores, strict=True)]
        times, per_second = os.times(), os.sysconf("SC_CLK_TCK")
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks) / per_second, (ticks[3] + ticks[4]) / per_second, own
