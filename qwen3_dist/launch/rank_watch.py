"""Finds ranks that hang: stopped processes, and ranks that are stuck in a kernel or keep the others waiting."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qwen3_dist.launch.base import names
from qwen3_dist.protocol.channel import Channel, ChannelClosedError, pack
from qwen3_dist.protocol.messages import AbortCollectives, RankStatus, StatusRequest

_log = logging.getLogger(__name__)
_PERIOD_S = 0.25
_FIRST_S = 1.0  # ranks are asked once a step has run for so long
_COLLECTIVES = "/qwen3_dist/parallel/"  # in the stack of a rank that waits in a collective
_REQUEST = pack(StatusRequest())
_ABORT = pack(AbortCollectives())
_ANSWER_S = 5.0  # for the rest of an answer that has begun


@dataclass(frozen=True)
class Hang:
    """Which ranks hang, and a sentence that says how."""

    ranks: Collection[int]
    message: str


class RankWatch:
    """Asks the ranks for their status while the engine waits for a step, and says which one hangs.

    A rank hangs if its status thread is silent for three quarters of `timeout_s`. A step hangs if it has run for the
    limit given to `begin` and no rank has entered a collective for half of `timeout_s`; where collectives cannot be
    seen (NCCL, gloo), the limit alone counts. Time in which the engine itself did not run does not count.
    """

    period_s = _PERIOD_S

    def __init__(self, timeout_s: float) -> None:
        self._silence_s = 0.75 * timeout_s
        self._idle_s = 0.5 * timeout_s
        self._channels: dict[int, Channel] = {}
        self.begin(None)

    def add(self, rank: int, channel: Channel) -> None:
        self._channels[rank] = channel

    def drop(self, rank: int) -> None:
        """Forgets a lost rank."""
        if channel := self._channels.pop(rank, None):
            channel.close()

    def abort_collectives(self) -> None:
        """Ends the collectives in which ranks may wait for a lost one."""
        for channel in self._channels.values():
            with contextlib.suppress(ChannelClosedError):  # the rank's other channel says why it ended
                channel.post(_ABORT)

    def renumber(self, ranks: Mapping[int, int]) -> None:
        """Gives the ranks, by their old numbers, new ones."""
        self._channels = {new: self._channels[old] for old, new in ranks.items() if old in self._channels}

    def begin(self, limit_s: float | None) -> None:
        """Tells that the engine begins to wait for a step; without a limit only silent ranks hang."""
        self._limit_s = limit_s
        self._age_s = self._unmoved_s = 0.0
        self._looked_s = time.monotonic()
        self._silent_s: dict[int, float] = {}  # ranks that owe an answer, and for how long
        self._statuses: dict[int, RankStatus] = {}
        self._operations = -1

    def look(self) -> Hang | None:
        """Asks and reads answers. Returns which ranks hang, if any do. Call it about every `period_s`."""
        now = time.monotonic()
        passed = min(now - self._looked_s, 2 * _PERIOD_S)
        self._looked_s = now
        self._age_s += passed
        if self._age_s < _FIRST_S:
            return None
        self._read_answers(passed)
        late = [rank for rank, silent_s in self._silent_s.items() if silent_s > self._silence_s]
        if late:
            self._log_stacks()
            silence_s = self._silence_s
            return Hang(
                late, f"{names(late)} did not answer for {silence_s:.2g} s: stopped, or not reachable"
            )
        if self._limit_s is None or self._age_s <= self._limit_s or self._unmoved_s < self._idle_s:
            return None
        self._log_stacks()
        return self._stuck()

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels = {}

    def _read_answers(self, passed_s: float) -> None:
        """Reads what has arrived, and asks the ranks that have answered, or were not asked yet, again."""
        for rank, channel in list(self._channels.items()):
            try:
                if rank not in self._silent_s:
                    channel.post(_REQUEST)
                    self._silent_s[rank] = 0.0
                    continue
                self._silent_s[rank] += passed_s
                while channel.readable():
                    self._statuses[rank] = channel.receive(_ANSWER_S)
                    self._silent_s.pop(rank, None)
            except (ChannelClosedError, TimeoutError):
                self._channels.pop(rank).close()  # the rank's other channel says why it ended
                self._silent_s.pop(rank, None)
        operations = sum(status.operations for status in self._statuses.values())
        self._unmoved_s = self._unmoved_s + passed_s if operations == self._operations else 0.0
        self._operations = operations

    def _stuck(self) -> Hang:
        """Says which ranks hang: those that others await and that await nobody, else those that are not in a
        collective, else all."""
        statuses = self._statuses
        awaited = {rank for status in statuses.values() for rank in status.awaited}
        causes = [rank for rank in awaited if rank in statuses and not statuses[rank].awaited]
        causes = causes or [rank for rank, status in statuses.items() if _COLLECTIVES not in status.stack]
        causes = causes or list(statuses)
        waiting = " and kept the others waiting" if len(causes) < len(statuses) else ""
        message = (
            f"{names(causes)} made no progress while {statuses[causes[0]].activity}{waiting} for {self._age_s:.1f} s; "
            "the log has the stacks of all ranks"
        )
        return Hang(causes, message)

    def _log_stacks(self) -> None:
        for rank, status in sorted(self._statuses.items()):
            _log.error(
                "rank %d, %s, awaits %s:\n%s", rank, status.activity, status.awaited or "nobody", status.stack
            )
