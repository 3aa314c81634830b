"""Changes the weights of a running engine, and puts it to sleep.

While steps go on, the ranks check whether the new files fit. Then no more steps are planned, and once none is in
flight all ranks load the new weights into the place of the old ones. Requests stay: their KV is computed anew from
their tokens, unless it is to be kept. If a rank fails after that, all load the old weights again. The rank's side is
`worker/weight_change.py` and `worker/sleep.py`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from qwen3_dist.engine.rank_work import RankWork
from qwen3_dist.errors import EngineDeadError, QwenDistError, ResourceError
from qwen3_dist.launch.base import Executor
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights_version import WeightsVersion

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsLoaded:
    """What a change of weights took: seconds in which no step ran, and the bytes that all ranks read together."""

    seconds: float
    bytes_read: int


Done = Callable[[Any], None]  # gets the result of a change, or the QwenDistError that it ended with
_Change = Generator[None, None, Any]  # goes on where it stopped at each tick


class _RefusedError(Exception):
    """Ends a change, after which everything is as it was."""

    def __init__(self, error: QwenDistError) -> None:
        super().__init__(str(error))
        self.error = error


class WeightChanges:
    """The weights of an engine's ranks, and their sleep. Called between steps.

    `adopt` is told the weights that all ranks have now, so that a rank that starts later loads the same.
    `forget_cache(keep)` empties the prefix cache, and with it the KV of running sequences unless `keep`.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        adopt: Callable[[WeightsVersion], None],
        forget_cache: Callable[[bool], None],
    ) -> None:
        self._executor, self._adopt, self._forget_cache = executor, adopt, forget_cache
        self._timeout_s = config.start_timeout_s
        self._asked: deque[tuple[_Change, Done]] = deque()
        self._weights = config.weights
        self._holds = self._idle = self._dropped = False
        self.has_begun = False  # whether a change is under way, with which no other may meet
        self.asleep = 0
        """The level of sleep; 0: awake. May be read from any thread."""

    def restart(self, weights: WeightsVersion) -> None:
        """Tells that the ranks have `weights`, that no sequence is left, and that what was going on will not be
        finished. An engine that slept sleeps again."""
        self._asked.clear()
        self._weights, self._holds, self.has_begun, self._dropped = weights, False, False, False
        if self.asleep:
            level, self.asleep = self.asleep, 0
            self.sleep(level, _log_failure)

    @property
    def is_busy(self) -> bool:
        """Whether something changes, so that `tick` must be called even if no step runs."""
        return bool(self._asked)

    @property
    def holds_steps(self) -> bool:
        """Whether no step is to be planned."""
        return self._holds or self.asleep > 0

    def replace(self, weights: WeightsVersion, keep_cache: bool, done: Done) -> None:
        """Makes `tick` give all ranks `weights`, whose digest is known. `done` gets WeightsLoaded, or the error of a
        rank that cannot load them; then all ranks have what they had."""
        self._asked.append((self._replace(weights, keep_cache), done))

    def sleep(self, level: int, done: Done) -> None:
        """Makes `tick` put the engine to sleep, or to another level of sleep; `done` gets True. Sequences stay."""
        self._asked.append((self._sleep(level), done))

    def wake(self, done: Done) -> None:
        """Makes `tick` wake the engine; `done` gets True, or the error of a rank that lacks memory or cannot load its
        weights. Then all sleep on."""
        self._asked.append((self._wake(), done))

    def tick(self, idle: bool) -> None:
        """Continues the first change. `idle`: no step is in flight. Never waits for ranks that read."""
        if not self._asked:
            return
        self._idle, self.has_begun = idle, True
        change, done = self._asked[0]
        outcome: Any
        try:
            next(change)
            return
        except StopIteration as end:
            outcome = end.value
        except _RefusedError as refusal:
            outcome = refusal.error
        self._holds = self.has_begun = False
        self._asked.popleft()
        done(outcome)

    def _replace(self, weights: WeightsVersion, keep_cache: bool) -> _Change:
        yield from self._open(weights)
        if self.asleep:
            self._adopt_for_wake(weights)
            return WeightsLoaded(0.0, 0)
        yield from self._pause()
        began_s = time.monotonic()
        if failed := (yield from self._load()):
            _log.error("the weights %s were not loaded: %s", weights, failed)
            if lost := (yield from self._load_again()):
                raise EngineDeadError(f"the weights that the ranks had cannot be loaded again: {lost}")
            raise _RefusedError(failed)
        bytes_read = sum(self._executor.call("finish_weights"))
        self._adopt_all(weights)
        self._forget_cache(keep_cache)
        return WeightsLoaded(time.monotonic() - began_s, bytes_read)

    def _sleep(self, level: int) -> _Change:
        if self.asleep == level:
            return True
        if self.asleep:
            yield from self._wake()
        yield from self._pause()
        self._forget_cache(False)
        self._executor.call("sleep", level)
        self.asleep, self._dropped = level, level == 2
        return True

    def _wake(self) -> _Change:
        if not self.asleep:
            return True
        self._wake_ranks()
        if self._dropped and (failed := (yield from self._load_again())):
            self._executor.call("sleep", 2)
            raise _RefusedError(failed)
        self._executor.call("wake_graphs")
        self.asleep, self._dropped = 0, False
        return True

    def _adopt_for_wake(self, weights: WeightsVersion) -> None:
        """Has the ranks, which sleep, load the weights that they have opened when they wake."""
        self._executor.call("drop_weights")
        if not self._dropped:
            self._wake_ranks()
            self._executor.call("sleep", 2)
            self._dropped = True
        self._adopt_all(weights)

    def _wake_ranks(self) -> None:
        """Has the ranks take their memory again. Raises _RefusedError if one lacks it; then all sleep on."""
        for rank, problem in enumerate(self._executor.call("wake")):
            if problem:
                self._executor.call("sleep", 2 if self._dropped else self.asleep)
                raise _RefusedError(ResourceError(f"rank {rank} cannot wake: {problem}"))

    def _open(self, weights: WeightsVersion) -> _Change:
        """Has the ranks check `weights` while steps go on. Raises _RefusedError if one cannot use them."""
        self._executor.call("open_weights", weights)
        if failed := (yield from self._await("weights_opened", "check")):
            self._executor.call("drop_weights")
            raise _RefusedError(failed)

    def _pause(self) -> _Change:
        """Waits until no step is in flight, and has none planned until this change ends."""
        self._holds = True
        while not self._idle:
            yield

    def _load(self) -> Generator[None, None, QwenDistError | None]:
        """Has the ranks load what they have opened. Returns the error of one that cannot."""
        self._executor.call("load_weights")
        return (yield from self._await("weights_loaded", "load"))

    def _load_again(self) -> Generator[None, None, QwenDistError | None]:
        """Has the ranks load the weights that were adopted last. Returns the error of one that cannot."""
        try:
            yield from self._open(self._weights)
        except _RefusedError as refusal:
            return refusal.error
        failed = yield from self._load()
        if failed is None:
            self._executor.call("finish_weights")
        return failed

    def _await(self, asks: str, verb: str) -> Generator[None, None, QwenDistError | None]:
        def too_late(ranks: str) -> QwenDistError:
            return ResourceError(f"{ranks} did not {verb} the weights within {self._timeout_s:g} s")

        work = RankWork(self._executor, asks, self._timeout_s, too_late)
        while not (answer := work.poll()):
            yield
        return None if answer is True else answer

    def _adopt_all(self, weights: WeightsVersion) -> None:
        self._weights = weights
        self._adopt(weights)


def _log_failure(outcome: Any) -> None:
    if isinstance(outcome, QwenDistError):
        _log.warning("the engine does not sleep any more: %s", outcome)
