"""What an engine does when ranks are lost: others take their place or, where none can be had, it goes on without their
dp groups and takes them back later. Imports no torch."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Any

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.grouping import goes_without, grouping_without
from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.expert_placement import Placements
from qwen3_dist.launch import Executor, Grouping
from qwen3_dist.launch.base import names
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 10.0  # before a reduced engine tries to get its ranks back; twice as long after each failure
_LAST_PAUSE_S = 300.0
_LOOK_S = 0.1  # between two looks for ranks that were started


@dataclass(frozen=True)
class Recovery:
    """A change of an engine's ranks: `ranks` were "replaced", "left" for want of others, "returned", or "failed" to
    return. Afterwards the engine runs `layout`. It took `seconds`, in which ranks read `bytes_read` of weights.

    The ranks are those of the layout that the engine was started with.
    """

    ranks: tuple[int, ...]
    seconds: float
    bytes_read: int
    change: str
    layout: str
    reason: str

    def __str__(self) -> str:
        verb = "were" if len(self.ranks) > 1 else "was"
        took = f"in {self.seconds:.1f} s and read {self.bytes_read:,} bytes"
        changed = f"the engine changed to {self.layout} {took}"
        return (
            names(self.ranks)
            + {
                "replaced": f" {verb} replaced {took}",
                "left": f" left: {changed}; {self.reason}",
                "returned": f" came back: {changed}",
                "failed": f" did not come back: {changed}; {self.reason}",
            }[self.change]
        )


@dataclass(frozen=True)
class Absence:
    """`ranks` of the layout that the engine was `configured` with are absent: it runs another one, for `reason`."""

    configured: str
    ranks: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return f"runs without {names(self.ranks)} of layout {self.configured}: {self.reason}"


class RanksReturnError(EngineDeadError):
    """Ends the steps of an engine that is to take ranks back."""


class Regrouping:
    """Decides which ranks an engine of `config` runs."""

    def __init__(
        self, executor: Executor, config: EngineConfig, model: ModelConfig, placements: Placements
    ) -> None:
        self._executor, self._configured, self._model = executor, config, model
        self._all = frozenset(range(config.layout.world))
        self._running = Grouping(config, placements, tuple(sorted(self._all)))
        self._broken: frozenset[int] = frozenset()  # seats whose ranks could not be replaced
        self._reason = ""
        self._invited: Grouping | None = None
        self._tried: frozenset[int] = frozenset()  # seats whose ranks did not start in this attempt
        self._pause_s = _FIRST_PAUSE_S
        self._next_s = math.inf  # the next attempt, or the next look for those that were invited
        self._returned_s = -math.inf  # when ranks came back last

    @property
    def absence(self) -> Absence | None:
        """What the engine goes without; None if it runs all its ranks. May be read from any thread."""
        absent = tuple(sorted(self._absent(self._running)))
        return Absence(str(self._configured.layout), absent, self._reason) if absent else None

    def adopt(self, **changed: Any) -> None:
        """Has ranks that start from now on load by `changed` settings. Those that are on their way start again."""
        self._configured = replace(self._configured, **changed)
        self._running = replace(self._running, config=replace(self._running.config, **changed))
        if self._invited is not None:
            self._executor.dismiss()
            self._invited, self._next_s = None, 0.0

    def tick(self) -> None:
        """Tries to get absent ranks back, now and then. Does not wait. Raises RanksReturnError when they are there, so
        that `recover` is called."""
        if not self._broken or time.monotonic() < self._next_s:
            return
        if self._invited is None:
            self._invite(frozenset())
            return
        self._next_s = time.monotonic() + _LOOK_S
        try:
            arrived = self._executor.arrived()
        except QwenDistError as error:
            self._not_come(error)
        else:
            if arrived:
                raise RanksReturnError("ranks that were absent are back, and the engine changes its layout")

    def recover(self, settled: Placements, cause: str, replaces: bool) -> tuple[Recovery, Grouping]:
        """Makes the engine's ranks work again, after an error or RanksReturnError: takes back those that have arrived,
        starts others in place of those that were lost, or goes on without them if none start, or not `replaces`.

        Returns what was done, and the ranks of now, with experts placed as `settled` if the layout stays. Raises
        QwenDistError if nothing works.
        """
        began_s, executor = time.monotonic(), self._executor
        lost, returns = executor.lost_seats, self._invited is not None
        broken, reason, failures = self._broken, cause, 0
        if lost:
            returns = False
            executor.dismiss()
        elif returns:
            broken = self._tried
        else:
            raise EngineDeadError(f"it is not known which rank was lost: {cause}")
        self._invited = None
        if lost and not replaces:
            broken, reason = broken | lost, f"{cause}, before the first step after the last recovery"
        while True:
            to = self._running if broken == self._broken else self._without(broken)
            if to is None:
                raise EngineDeadError(reason)
            if to.seats == self._running.seats:
                to = replace(to, placements=settled)
            try:
                bytes_read = executor.regroup(to, self._patience_s(broken | lost))
                break
            except QwenDistError as error:
                failed = executor.lost_seats
                if not failed:
                    raise
                _log.warning("ranks did not meet: %s", error)
                lost, failures = lost | failed, failures + 1
                if returns or goes_without(failures, error):
                    broken, failures = broken | failed, 0
                    reason = str(error) if returns else f"{cause}; no other rank took its place: {error}"
        return self._changed(to, broken, lost, returns, reason, began_s, bytes_read), to

    def _changed(
        self,
        to: Grouping,
        broken: frozenset[int],
        lost: frozenset[int],
        returns: bool,
        reason: str,
        began_s: float,
        bytes_read: int,
    ) -> Recovery:
        """Takes note of a change, decides when to try next, and describes it."""
        now = time.monotonic()
        before, absent = self._absent(self._running), self._absent(to)
        self._running, self._broken = to, broken
        ranks, change = lost, "replaced"
        if left := absent - before:
            ranks, change, self._reason = left, "left", reason
            if now - self._returned_s > _LAST_PAUSE_S:
                self._pause_s = _FIRST_PAUSE_S
        elif back := before - absent:
            ranks, change, reason, self._returned_s = back, "returned", "", now
        elif returns:
            ranks, change = absent, "failed"
        if broken:
            self._pause()
        of = tuple(sorted(ranks))
        return Recovery(of, now - began_s, bytes_read, change, str(to.config.layout), reason)

    def _without(self, seats: frozenset[int]) -> Grouping | None:
        return grouping_without(self._configured, self._model, seats)

    def _absent(self, running: Grouping) -> frozenset[int]:
        return self._all.difference(running.seats)

    def _patience_s(self, lost: frozenset[int]) -> float:
        """How long ranks may take to start: shorter if the engine can go on without them."""
        config = self._configured
        return config.start_timeout_s if self._without(lost) is None else config.replacement_timeout_s

    def _invite(self, tried: frozenset[int]) -> None:
        """Starts the absent ranks but those at the seats `tried`, which did not start just now; waits for the next
        attempt if the engine would have no more ranks with the others."""
        to = self._without(tried)
        if to is None or len(to.seats) <= len(self._running.seats):
            self._pause()
            return
        self._invited, self._tried, self._next_s = to, tried, 0.0
        try:
            self._executor.invite(to, self._configured.replacement_timeout_s)
        except QwenDistError as error:
            self._not_come(error)

    def _not_come(self, error: QwenDistError) -> None:
        missing = self._executor.missing_seats
        _log.info("%s are still absent: %s", names(missing), error)
        self._executor.dismiss()
        self._invited = None
        self._invite(self._tried | missing)

    def _pause(self) -> None:
        self._next_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
