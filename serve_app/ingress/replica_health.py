"""Polls the health of the replicas, so that `/health` and `/ready` answer at once, from the last result."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

from ray.exceptions import RayActorError

from serve_app.replica_status import ReplicaStatus

ANSWER_TIMEOUT_S = 5.0


class ReplicaHealth:
    """Polls all replicas every `period_s` seconds in a task of the running event loop.

    `ask` returns the status of each replica, or the exception of the call. If no replica answers, because all are
    busy, the last result stays valid for `patience_s` seconds: by then Serve has replaced a replica that hangs.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Sequence[ReplicaStatus | BaseException]]],
        period_s: float,
        patience_s: float,
    ) -> None:
        self._ask = ask
        self.period_s = period_s
        self.patience_s = patience_s
        self._poll_now = asyncio.Event()
        self._polled = asyncio.Event()
        self._answered_at = time.monotonic()
        self.num_healthy = 0
        self.queued_tokens = 0  # in all replicas at the last poll; whoever sends them more adds to it
        self.was_healthy = False  # whether some replica ever was
        self.num_lost = 0  # replicas that were found dead, since the start
        self.num_request_losses = 0
        self._num_gone = 0
        self._task = asyncio.create_task(self._watch())

    def poll_soon(self) -> None:
        """Polls again at once, because a request has just lost its replica."""
        self.num_request_losses += 1
        self._poll_now.set()

    def stop(self) -> None:
        """Stops polling."""
        self._task.cancel()
        self._polled.set()

    async def refresh(self) -> None:
        """Polls all replicas once."""
        try:
            answers = await asyncio.wait_for(self._ask(), ANSWER_TIMEOUT_S)
        except Exception:  # noqa: BLE001 - whatever failed, no replica answered
            answers = [TimeoutError()]
        told = [answer for answer in answers if isinstance(answer, ReplicaStatus)]
        healthy = sum(not status.problem for status in told)
        self.queued_tokens = sum(status.queued_tokens for status in told)
        gone = sum(isinstance(answer, RayActorError) for answer in answers)
        self.num_lost += max(0, gone - self._num_gone)  # Serve may name a dead replica more than once
        self._num_gone = gone
        late = [each for each in answers if not isinstance(each, ReplicaStatus | RayActorError)]
        now = time.monotonic()
        if healthy or not late or now - self._answered_at > self.patience_s:
            self.num_healthy = healthy
            self.was_healthy = self.was_healthy or healthy > 0
            self._answered_at = now
        self._polled.set()

    async def known(self) -> None:
        """Waits for the first poll, which takes at most ANSWER_TIMEOUT_S seconds, or for `stop`."""
        await self._polled.wait()

    async def _watch(self) -> None:
        while True:
            await self.refresh()
            self._poll_now.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poll_now.wait(), self.period_s)
