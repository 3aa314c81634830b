"""What is known of the replicas' health, so that whoever asks is answered at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

from ray.exceptions import RayActorError

from qwen3_dist.errors import EngineDeadError

ANSWER_TIMEOUT_S = 5.0
_GONE = (EngineDeadError, RayActorError)


class ReplicaHealth:
    """Asks all replicas every `period_s` seconds, in a task of the running event loop, and remembers what they said.

    `ask` returns None for each healthy replica and the exception of each other. Replicas that are too busy to answer
    keep the health that they had, for `patience_s` seconds: by then Serve has replaced one that hangs.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Sequence[BaseException | None]]],
        period_s: float,
        patience_s: float,
    ) -> None:
        self._ask = ask
        self._period_s = period_s
        self._patience_s = patience_s
        self._doubted = asyncio.Event()
        self._answered_at = time.monotonic()
        self.num_healthy = 0
        self._task = asyncio.create_task(self._watch())

    def doubt(self) -> None:
        """Asks again at once: a request has just lost its replica."""
        self._doubted.set()

    def stop(self) -> None:
        """Ends the asking."""
        self._task.cancel()

    async def refresh(self) -> None:
        """Asks all replicas now."""
        try:
            answers = await asyncio.wait_for(self._ask(), ANSWER_TIMEOUT_S)
        except Exception:  # noqa: BLE001 - nobody could be asked: what was known holds for a while
            answers = [TimeoutError()]
        healthy = sum(answer is None for answer in answers)
        late = [each for each in answers if each is not None and not isinstance(each, _GONE)]
        now = time.monotonic()
        if healthy or not late or now - self._answered_at > self._patience_s:
            self.num_healthy = healthy
            self._answered_at = now

    async def _watch(self) -> None:
        while True:
            await self.refresh()
            self._doubted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._doubted.wait(), self._period_s)
