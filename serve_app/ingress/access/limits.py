"""Limits of one API key: requests and tokens per minute, and requests at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from serve_app.settings.keys import Key

_MINUTE_S = 60.0
_MAX_GUESS_S = 30
_RECENT = 0.2  # weight of the latest request in the mean duration
Clock = Callable[[], float]


class KeyLimitError(RequestError):
    """A key has used up a limit (429). The client may retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(f"{message}; retry in {retry_after_s} s", status=HTTPStatus.TOO_MANY_REQUESTS)
        self.retry_after_s = retry_after_s


class Bucket:
    """A token bucket that refills evenly and holds what a minute refills, at least 1. It starts full.

    What is taken may exceed what is there: the bucket then owes, and refills from below 0.
    """

    def __init__(self, now: float) -> None:
        self._level = math.inf  # cut to the size of the bucket by the first `fill`
        self._filled_s = now

    def wait_s(self, per_minute: float, now: float) -> float:
        """Refills at `per_minute` until `now`, in seconds. Returns the seconds until the bucket holds 1."""
        level = self._level + per_minute / _MINUTE_S * (now - self._filled_s)
        self._level, self._filled_s = min(level, max(1.0, per_minute)), now
        return max(0.0, 1.0 - self._level) / per_minute * _MINUTE_S

    def take(self, amount: float) -> None:
        """Takes `amount`. Call `wait_s` before the first."""
        self._level -= amount


class KeyLimits:
    """What one key has used of its limits. The limits themselves come with each call, since they may change.

    `share` is the part of each limit that this process may use: 1 divided by the number of ingress processes.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._requests, self._tokens = Bucket(clock()), Bucket(clock())
        self._running = 0
        self._duration_s = 0.0  # recent mean

    def check(self, key: Key, share: float) -> None:
        """Counts a request. Raises KeyLimitError, and counts nothing, if a limit is used up."""
        self._check_running(key, share)
        now = self._clock()
        waits = [
            (bucket.wait_s(per_minute * share, now), f"{per_minute} {unit} per minute")
            for bucket, per_minute, unit in (
                (self._requests, key.requests_per_minute, "requests"),
                (self._tokens, key.tokens_per_minute, "tokens"),
            )
            if per_minute is not None
        ]
        wait_s, limit = max(waits, default=(0.0, ""))
        if wait_s > 0:
            raise KeyLimitError(f"the key {key.name!r} may use {limit}", max(1, math.ceil(wait_s)))
        self._requests.take(1.0)

    @contextmanager
    def running(self, key: Key, share: float) -> Iterator[None]:
        """A context in which a request of the key runs. Raises KeyLimitError if too many run already."""
        self._check_running(key, share)
        begun_s = self._clock()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._duration_s += _RECENT * (self._clock() - begun_s - self._duration_s)

    def charge(self, tokens: int) -> None:
        """Counts the tokens of a request that was answered."""
        self._tokens.take(tokens)

    def _check_running(self, key: Key, share: float) -> None:
        most = key.max_concurrent_requests
        if most is not None and self._running >= math.ceil(most * share):
            guess_s = math.ceil(self._duration_s / self._running)
            raise KeyLimitError(
                f"the key {key.name!r} may run {most} requests at once", min(_MAX_GUESS_S, max(1, guess_s))
            )
