"""Admission control: limits the sequences in flight and refuses requests beyond the limit with 429."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType

from qwen3_dist.errors import RequestError

# Response headers that `proxy` reads and removes. The first is on every answer of the service, the second on a 429.
MAX_IN_FLIGHT_HEADER = "x-max-in-flight"
REFUSE_FOR_HEADER = "x-refuse-for-ms"
_WINDOW_S = 10.0  # the rate of ended sequences is measured over about this time
_MAX_RETRY_AFTER_S = 30


def with_jitter(seconds: int) -> int:
    """A random whole number from half to one and a half of `seconds`, from 1 to _MAX_RETRY_AFTER_S, so that clients
    that were refused together do not all retry together."""
    seconds = min(seconds, _MAX_RETRY_AFTER_S * 2 // 3)
    return random.randint(max(1, seconds // 2), seconds + seconds // 2)


class OverloadedError(RequestError):
    """The service is full (429). The client may retry after `retry_after_s` seconds.

    Proxies may refuse other requests for `refuse_for_ms` milliseconds without asking the service: a tenth of
    `retry_after_s`, in which about a tenth of the sequences in flight end.
    """

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(
            f"the service already has {limit} sequences running or waiting; retry in {retry_after_s} s",
            status=HTTPStatus.TOO_MANY_REQUESTS,
        )
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.refuse_for_ms = 100 * retry_after_s


def queue_headers(retry_after_s: int) -> dict[str, str]:
    """Headers of a 429 for a wait in engines that is too long. Proxies refuse no other request for it; metrics count
    it as overload."""
    return {"retry-after": str(retry_after_s), REFUSE_FOR_HEADER: "0"}


class QueueFullError(RequestError):
    """Too many tokens wait to be computed (429). The client may retry after `retry_after_s` seconds."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"about {waiting} tokens of other requests wait already; retry in {retry_after_s} s",
            status=HTTPStatus.TOO_MANY_REQUESTS,
        )
        self.retry_after_s = retry_after_s


class Admission:
    """Counts the sequences in flight: each choice of each prompt of each request.

    `limit()` is what the service takes, `num_ingresses()` how many ingresses share it evenly. A request is admitted
    while fewer than this ingress's share are in flight, whatever its own size, so that small requests cannot starve a
    large one. A request counts as at most `max_per_request` sequences, so that one request cannot fill the service.
    """

    def __init__(
        self, limit: Callable[[], int], max_per_request: int, num_ingresses: Callable[[], int] = lambda: 1
    ) -> None:
        self._limit, self._num_ingresses = limit, num_ingresses
        self.max_per_request = max_per_request
        self.in_flight = 0
        self._ended = 0.0
        self._ended_since = time.monotonic()

    def check(self, own: int = 0) -> None:
        """Raises OverloadedError if the limit is reached, not counting `own`: sequences of the request itself."""
        if self.in_flight - own >= self.share():
            raise OverloadedError(self._limit(), self.retry_after_s())

    def share(self) -> int:
        """Sequences that this ingress takes."""
        return math.ceil(self._limit() / self._num_ingresses())

    def admit(self) -> Admitted:
        """A context for one request, which counts as one sequence until `count` is called. Raises OverloadedError."""
        self.check()
        return Admitted(self)

    def end(self, num_sequences: int) -> None:
        """Subtracts the sequences of a request that ended."""
        self.in_flight -= num_sequences
        self._ended += num_sequences

    def retry_after_s(self) -> int:
        """Roughly the seconds until all sequences in flight have ended, at the recent rate of ended sequences."""
        now = time.monotonic()
        elapsed = now - self._ended_since
        rate = self._ended / elapsed if elapsed > 0 else 0.0
        if elapsed > _WINDOW_S:
            self._ended, self._ended_since = self._ended / 2, now - elapsed / 2
        return with_jitter(math.ceil(self.in_flight / rate)) if rate else 1


class Admitted:
    """A context during which the sequences of one request count as in flight."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_sequences = 1
        admission.in_flight += 1

    def count(self, num_sequences: int) -> None:
        """Sets how many sequences the request has. Raises OverloadedError if other requests have filled the
        service."""
        self._admission.check(own=self._num_sequences)
        num_sequences = min(num_sequences, self._admission.max_per_request)
        self._admission.in_flight += num_sequences - self._num_sequences
        self._num_sequences = num_sequences

    def __enter__(self) -> Admitted:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.end(self._num_sequences)
        self._num_sequences = 0
