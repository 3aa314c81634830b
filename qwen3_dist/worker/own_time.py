"""How long this rank's own part of its steps takes, by which an engine finds the rank that the others wait for."""

from __future__ import annotations

from qwen3_dist.parallel.context import ParallelContext


class OwnTime:
    """The time of a rank in its steps, less the time in which it waited for other ranks there."""

    def __init__(self, parallel: ParallelContext) -> None:
        self._parallel = parallel
        self._waited_before_s = parallel.waited_s
        self._steps, self._in_steps_s = 0, 0.0

    def add(self, seconds: float) -> None:
        """Counts a step that took `seconds`, waiting included."""
        self._steps += 1
        self._in_steps_s += seconds

    def read(self) -> tuple[int, float] | None:
        """The number of steps and the seconds of their own parts; None if the host cannot know how long it waited."""
        before_s, now_s = self._waited_before_s, self._parallel.waited_s
        if before_s is None or now_s is None:
            return None
        return self._steps, self._in_steps_s - (now_s - before_s)
