"""Work that every rank does in a thread, as reading weights, while the engine does something else."""

from __future__ import annotations

import time
from collections.abc import Callable

from qwen3_dist.errors import QwenDistError
from qwen3_dist.launch.base import Executor, names

POLL_S = 0.01  # between two questions to the ranks whether they are done


class RankWork:
    """What the ranks have begun to do when this is created.

    `asks` is the method by which ranks tell whether they are done: True, False, or the error that says why they cannot
    be. If some are not after `timeout_s`, `too_late` makes an error of their names.
    """

    def __init__(
        self, executor: Executor, asks: str, timeout_s: float, too_late: Callable[[str], QwenDistError]
    ) -> None:
        self._executor, self._asks, self._too_late = executor, asks, too_late
        now = time.monotonic()
        self._deadline, self._next_poll_s = now + timeout_s, now + POLL_S

    def poll(self) -> bool | QwenDistError:
        """Whether all ranks are done, or the first error of one. Asks them now and then, and never waits for them."""
        now = time.monotonic()
        if now < self._next_poll_s:
            return False
        self._next_poll_s = now + POLL_S
        answers = self._executor.call(self._asks)
        if failed := next((answer for answer in answers if isinstance(answer, QwenDistError)), None):
            return failed
        late = [rank for rank, done in enumerate(answers) if not done]
        if late and now > self._deadline:
            return self._too_late(names(late))
        return not late
