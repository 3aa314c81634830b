"""Which rank the others wait for: the one whose own part of a step takes longest. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qwen3_dist.launch.base import Executor

_PERIOD_S = 1.0  # ranks are asked no more often, since they answer between two steps


@dataclass(frozen=True)
class RankPace:
    """How long ranks work on a step themselves, without waiting for other ranks, in rank order.

    `step_s` is the mean of the steps between the last two readings, `total_s` the sum over all steps since the start.
    """

    step_s: tuple[float, ...]
    total_s: tuple[float, ...]

    @property
    def slowest(self) -> int:
        """The rank with the longest part of a step."""
        return max(range(len(self.step_s)), key=self.step_s.__getitem__)

    @property
    def excess(self) -> float:
        """The part of the slowest rank over the mean of the others, less 1."""
        slowest_s = self.step_s[self.slowest]
        others_s = (sum(self.step_s) - slowest_s) / (len(self.step_s) - 1)
        return slowest_s / others_s - 1 if others_s > 0 else 0.0


class RankPaces:
    """Asks the ranks of `executor` for the time that steps took them, at most once a second.

    Ranks on GPUs whose collectives NCCL carries do not know it, since their hosts do not wait inside a step.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._known = len(executor.ranks) > 1
        self._read_s = 0.0
        self._before: list[tuple[int, float]] = [(0, 0.0)] * len(executor.ranks)
        self._pace: RankPace | None = None
        self._earlier_s = (0.0,) * len(executor.ranks)  # before ranks were replaced

    def restart(self) -> None:
        """Tells that the ranks count from 0 again, and that there may be more or fewer."""
        world = len(self._executor.ranks)
        self._before = [(0, 0.0)] * world
        totals = () if self._pace is None else self._pace.total_s
        earlier_s = (
            *totals,
            *self._earlier_s[len(totals) :],
        )  # of ranks that have left, too, for their return
        self._earlier_s = (*earlier_s, *(0.0,) * (world - len(earlier_s)))
        self._known, self._pace = world > 1, None

    def read(self) -> RankPace | None:
        """The pace since the last reading, or of the last steps before it if there were none; None if there is one
        rank, before the first step, and if ranks do not know. Raises EngineDeadError if a rank is lost."""
        now = time.monotonic()
        if not self._known or (self._pace is not None and now - self._read_s < _PERIOD_S):
            return self._pace
        self._read_s = now
        told: list[tuple[int, float]] = [
            each for each in self._executor.call("read_own_time") if each is not None
        ]
        self._known = len(told) == len(self._before)
        if self._known and all(
            steps > earlier for (steps, _), (earlier, _) in zip(told, self._before, strict=True)
        ):
            self._pace = RankPace(
                tuple(
                    (own_s - earlier_s) / (steps - earlier)
                    for (steps, own_s), (earlier, earlier_s) in zip(told, self._before, strict=True)
                ),
                tuple(earlier + own_s for earlier, (_, own_s) in zip(self._earlier_s, told, strict=False)),
            )
            self._before = told
        return self._pace

    def start_profile(self, apart: bool) -> None:
        """Times the operations of the steps from now on, see `worker/step_profile.py`."""
        self._executor.call("start_profile", apart)

    def end_profile(self) -> list[tuple[int, dict[str, float]]]:
        """The steps of each rank since `start_profile`, and their seconds by operation."""
        return self._executor.call("end_profile")
