"""Polls the health of the replicas, so that `/health` and `/ready` answer at once, from the last result."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from ray.exceptions import ActorDiedError

from serve_app.ingress.replica_table import ReplicaTable
from serve_app.replica_status import ReplicaStatus

ANSWER_TIMEOUT_S = 2.0
_NONE_PERIOD_S = 0.5  # between two polls while no replica is healthy: the next one is awaited
SILENT_S = 5.0  # without an answer, after which other replicas take over what a replica has


class Poll(NamedTuple):
    """What the `running` replicas, by their ids, answered to a poll, in any order."""

    running: Sequence[str]
    answers: Sequence[ReplicaStatus | BaseException]


class ReplicaHealth:
    """Polls all replicas every `period_s` seconds, more often while none is healthy, in a task of the running loop.

    `ask` polls once. If no replica answers, because all are busy, the last result stays valid for `patience_s`
    seconds: by then Serve has replaced a replica that hangs. A replica that is silent for SILENT_S seconds while
    another is healthy is given to `on_silent`.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Poll]],
        period_s: float,
        patience_s: float,
        table: ReplicaTable,
        on_silent: Callable[[str], None] = lambda replica: None,
    ) -> None:
        self._ask, self._table, self._on_silent = ask, table, on_silent
        self.period_s = period_s
        self.patience_s = patience_s
        self._poll_now = asyncio.Event()
        self._polled = asyncio.Event()
        self._answered_at = time.monotonic()
        self._heard_at: dict[str, float] = {}  # when each running replica last answered
        self._replica_of: dict[str, str] = {}  # by the actor
        self._lost: set[str] = set()  # replicas, or actors that never answered
        self.num_healthy = 0
        self.queued_tokens = 0  # in all replicas at the last poll; whoever sends them more adds to it
        self.was_healthy = False  # whether some replica ever was
        self.num_request_losses = 0
        self._task = asyncio.create_task(self._watch())

    @property
    def num_lost(self) -> int:
        """Replicas that were found dead or hanging, since the start."""
        return len(self._lost)

    def lose_request(self, replica: str, is_dead: bool) -> None:
        """Notes that a request has lost its replica; "" if it is not known which. Polls again at once."""
        self.num_request_losses += 1
        if replica and is_dead:
            self._lose(replica)
        elif replica:
            self._table.avoid(replica)
        self.poll_soon()

    def poll_soon(self) -> None:
        """Polls again at once."""
        self._poll_now.set()

    def stop(self) -> None:
        """Stops polling."""
        self._task.cancel()
        self._polled.set()

    async def refresh(self) -> None:
        """Polls all replicas once."""
        try:
            poll = await asyncio.wait_for(self._ask(), 2 * ANSWER_TIMEOUT_S)
        except Exception:  # noqa: BLE001 - whatever failed, no replica answered
            poll = Poll((), [TimeoutError()])
        told = [answer for answer in poll.answers if isinstance(answer, ReplicaStatus)]
        self._replica_of |= {status.actor: status.replica for status in told}
        actors = [str(answer.actor_id) for answer in poll.answers if isinstance(answer, ActorDiedError)]
        dead = [self._replica_of.get(actor, actor) for actor in actors]
        for each in dead:  # more than once, while Serve still names it
            self._lose(each)
        silent = set(poll.running) - {status.replica for status in told} - set(dead)
        healthy = sum(not status.problem for status in told)
        self.queued_tokens = sum(status.queued_tokens for status in told)
        self._table.update(told, silent.union(dead))
        now = time.monotonic()
        if healthy or len(told) + len(dead) == len(poll.answers) or now - self._answered_at > self.patience_s:
            self.num_healthy = healthy
            self.was_healthy = self.was_healthy or healthy > 0
            self._answered_at = now
        self._heard_at = {
            each: self._heard_at.get(each, now) if each in silent else now for each in poll.running
        }
        for each in silent if healthy else ():
            if now - self._heard_at[each] >= SILENT_S:
                self._on_silent(each)
        self._polled.set()

    def _lose(self, replica: str) -> None:
        self._lost.add(replica)
        self._table.forget(replica)

    async def known(self) -> None:
        """Waits for the first poll, which takes at most 2 * ANSWER_TIMEOUT_S seconds, or for `stop`."""
        await self._polled.wait()

    async def _watch(self) -> None:
        while True:
            await self.refresh()
            self._poll_now.clear()
            with contextlib.suppress(TimeoutError):
                period_s = self.period_s if self.num_healthy else min(self.period_s, _NONE_PERIOD_S)
                await asyncio.wait_for(self._poll_now.wait(), period_s)
