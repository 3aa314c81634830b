"""How many sequences may be in flight, and who is refused beyond."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType

from qwen3_dist.errors import RequestError

# Headers of ours for Serve's proxies, of any answer and of a refusal: see `proxy`.
LIMIT_HEADER = "x-most-in-flight"
HOLDS_HEADER = "x-refusal-holds-ms"
_WINDOW_S = 10.0  # over which ended sequences are counted
_MOST_RETRY_S = 30


def spread(seconds: int) -> int:
    """A whole number around `seconds`, at least 1: clients refused together should not all come back together."""
    return random.randint(max(1, seconds // 2), seconds + seconds // 2)


class OverloadedError(RequestError):
    """A request for which there is no room (429); it may come again after `retry_after_s` seconds.

    For `holds_ms` milliseconds others may be refused unasked: by then a tenth of those in flight have probably ended,
    and enough wait.
    """

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(
            f"{limit} sequences are in flight or wait already; send the request again in {retry_after_s} s",
            status=HTTPStatus.TOO_MANY_REQUESTS,
        )
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.holds_ms = 100 * retry_after_s


class Admission:
    """Counts the sequences in flight: each choice of each prompt of each request.

    A request is admitted while fewer than `limit()` are in flight, so a large one finds its turn beside small ones. It
    counts `most_of_one` at most, so that one alone cannot fill the service.
    """

    def __init__(self, limit: Callable[[], int], most_of_one: int) -> None:
        self._limit = limit
        self.most_of_one = most_of_one
        self.in_flight = 0
        self._ended = 0.0
        self._ended_since = time.monotonic()

    def check(self, besides: int = 0) -> None:
        """Raises OverloadedError if there is no room for another request, `besides` the sequences of itself."""
        limit = self._limit()
        if self.in_flight - besides >= limit:
            raise OverloadedError(limit, self._retry_after_s())

    def admit(self) -> Admitted:
        """A request in flight until its context ends, of one sequence until it says more. Raises OverloadedError."""
        self.check()
        return Admitted(self)

    def end(self, num_sequences: int) -> None:
        """Takes a request's sequences out."""
        self.in_flight -= num_sequences
        self._ended += num_sequences

    def _retry_after_s(self) -> int:
        """About the seconds in which, at the rate of late, those that are in flight will have ended."""
        now = time.monotonic()
        elapsed = now - self._ended_since
        rate = self._ended / elapsed if elapsed > 0 else 0.0
        if elapsed > _WINDOW_S:
            self._ended, self._ended_since = self._ended / 2, now - elapsed / 2
        return min(_MOST_RETRY_S, spread(math.ceil(self.in_flight / rate))) if rate else 1


class Admitted:
    """A context in which a request's sequences count as in flight."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_sequences = 1
        admission.in_flight += 1

    def count(self, num_sequences: int) -> None:
        """Tells how many sequences the request has. Raises OverloadedError if others took the room meanwhile."""
        self._admission.check(besides=self._num_sequences)
        num_sequences = min(num_sequences, self._admission.most_of_one)
        self._admission.in_flight += num_sequences - self._num_sequences
        self._num_sequences = num_sequences

    def __enter__(self) -> Admitted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.end(self._num_sequences)
        self._num_sequences = 0
