"""Sends requests to replicas, has others go on where a replica was lost, and enforces the request timeout."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from http import HTTPStatus
from itertools import chain, repeat
from typing import Any, TypeVar
from uuid import uuid4

import pydantic_core

from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from serve_app.apis.shared.answer import DIED, LEFT, Counted, Running
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.failures import log_internal_error
from serve_app.ingress.interrupt import Interrupt, InterruptedWaitError
from serve_app.ingress.progress import Progress
from serve_app.telemetry.summary import LastPart, RequestSummary

T = TypeVar("T")
logger = logging.getLogger("ray.serve")
# Waits between tries; the last one is repeated.
PAUSES_S = (0.1, 0.3, 1.0, 2.0)
_MAX_DEATHS = 1  # a request that ran on more replicas when they were lost may have killed them
_PING_PERIOD_S = 10.0  # proxies close connections that are idle for a minute
_LOST = "the replica that ran this request was lost; send it again"
_OK, _UNAVAILABLE = HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE
_ACCEPTED = (_OK, b"")


class Dispatcher:
    """Sends requests to replicas with `send`, which takes a request and its id and returns the answer's items: a pair
    of HTTP status and body, then the parts of a stream. Empty parts are not passed on.

    A request may take `timeout_s` seconds, retries included; 0 means no limit. After the loss of its replica it waits
    `resume_timeout_s` seconds for another one. If that is lost too before it has begun the request, the same seconds
    go on. `on_loss` is called with the id of a replica that a request has lost, "" if it is not known, and whether
    that replica is dead.
    """

    def __init__(
        self,
        send: Callable[..., Any],
        timeout_s: float = 0.0,
        on_loss: Callable[[str, bool], None] = lambda replica, is_dead: None,
        pauses_s: tuple[float, ...] = PAUSES_S,
        resume_timeout_s: float = 300.0,
    ) -> None:
        self._send = send
        self.timeout_s, self.resume_timeout_s = timeout_s, resume_timeout_s
        self.on_loss = on_loss
        # By the replica that runs them, "" if none has told that it does.
        self._calls: dict[str, set[Any]] = defaultdict(set)
        self._pauses_s = pauses_s

    def lose(self, replica: str) -> None:
        """Has the requests of `replica` go on elsewhere, and those that no replica has told yet that it has them."""
        for call in [*self._calls[replica], *self._calls[""]]:
            call.cancel()

    async def answer(
        self,
        request: Any,
        request_id: str,
        *context: Any,
        charge: Callable[[int], None] = lambda tokens: None,
        on_count: Callable[[Counted], None] = lambda item: None,
        on_end: Callable[[RequestSummary], None] = lambda summary: None,
        on_resume: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[Any, None]:
        """The items of the answer: a pair of HTTP status and body, then the parts of a stream.

        The pair of a stream that is accepted has an empty body. If the replica is lost, another one goes on after what
        the ingress has of the answer; if a stream had begun, pings come while that takes long. Raises EngineDeadError
        if no replica takes the request in time. Raises RequestError on a timeout (408), on a bug (500; logged under
        `request_id`), and if two replicas in a row were lost that had begun the request, and the second sent nothing
        of the answer (500). Closing this generator cancels the request.

        `charge` is called before each item with the number of tokens that the request has used since the last one,
        `on_count` with the item and its counts, and `on_end` with the summary that a replica sends with the last item.
        `on_resume` is called when a replica has the request in place of one that was lost.
        `send` gets `context` too.
        """
        now = asyncio.get_running_loop().time()
        deadline = now + self.timeout_s if self.timeout_s else None
        progress = Progress()
        pauses = chain(self._pauses_s, repeat(self._pauses_s[-1]))
        while True:
            try:
                tried = self._try(
                    progress, deadline, charge, on_count, on_resume, request, request_id, *context
                )
                tried = _with_pings(tried, request.ping) if progress.begun else tried
                async with contextlib.aclosing(tried) as items:
                    async for item in items:
                        part = item[1] if isinstance(item, tuple) else item
                        if isinstance(part, LastPart):
                            progress.ended = True
                            on_end(part.summary)
                            item = (item[0], bytes(part)) if isinstance(item, tuple) else bytes(part)
                        if isinstance(item, tuple) and progress.accepted:
                            item = part_of(*item)  # of another replica, after the first was lost
                        progress.accepted = progress.accepted or item == _ACCEPTED
                        progress.begun = progress.begun or item not in (b"", _ACCEPTED)
                        if item:
                            yield item
                return
            except EngineDeadError:
                self.on_loss(progress.replica, progress.replica_died)
                if progress.ended:
                    return
                self._check_loss(progress, request_id)
                request = _after_loss(request, progress)
            await self._in_time(asyncio.sleep(next(pauses)), deadline, progress)

    def _check_loss(self, progress: Progress, request_id: str) -> None:
        """Notes that the replica was lost. Raises what the client is told if the request is not tried again."""
        now = asyncio.get_running_loop().time()
        if progress.runs:
            progress.lose()
            logger.warning("request %s lost its replica and waits for another", request_id)
        progress.lost_s = progress.lost_s or now
        if progress.deaths > _MAX_DEATHS:
            logger.error(
                "request %s ran on %d replicas when they were lost; it is not tried again",
                request_id,
                progress.deaths,
            )
            raise RequestError(
                f"{progress.deaths} replicas were lost while they ran this request, so it is not tried again",
                status=HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        if now - progress.lost_s >= self.resume_timeout_s:
            raise self._not_resumed(progress)

    def _not_resumed(self, progress: Progress) -> EngineDeadError:
        limit_s = self.resume_timeout_s
        if not progress.ran:
            return EngineDeadError(
                f"no replica took this request within {limit_s:g} s; send it again"
                if limit_s
                else "the model's replica was just lost; send the request again"
            )
        if not limit_s:
            return EngineDeadError(_LOST)
        return EngineDeadError(
            f"the replica that ran this request was lost, and no other ran it within {limit_s:g} s; send it again"
        )

    async def _try(
        self,
        progress: Progress,
        deadline: float | None,
        charge: Callable[[int], None],
        on_count: Callable[[Counted], None],
        on_resume: Callable[[], None],
        request: Any,
        request_id: str,
        *context: Any,
    ) -> AsyncGenerator[Any, None]:
        """One try on one replica. Raises EngineDeadError if the replica is lost or answers that its engine died."""
        resume = {"resume": progress.resume} if progress.begun or progress.resume.choices else {}
        progress.replica, progress.waits, progress.replica_died = "", False, True
        items = self._send(request, request_id, *context, **resume)
        self._calls[""].add(items)
        late = Interrupt()
        timer: asyncio.TimerHandle | None = None  # one for all parts
        try:
            while True:
                if progress.runs and timer is None and deadline is not None:
                    timer = asyncio.get_running_loop().call_at(deadline, late.fire)
                if timer is not None:
                    item = await late.wait(anext, items, None)
                elif progress.runs:
                    item = await anext(items, None)
                else:
                    item = await self._in_time(anext(items, None), deadline, progress)
                if item is None:
                    return
                if isinstance(item, Running):
                    self._calls[""].discard(items)
                    self._calls[item.replica].add(items)
                    progress.replica, progress.waits = item
                    if progress.taken():
                        on_resume()
                    continue
                if isinstance(item, Counted):
                    charge(progress.count(item))
                    on_count(item)
                    item = item.item
                status, body = item if isinstance(item, tuple) else (_OK, item)
                if status == _UNAVAILABLE:
                    progress.replica_died = body == DIED
                    if body == LEFT and progress.runs:
                        progress.lose(leaves=True)
                    raise EngineDeadError(_LOST)
                if not progress.runs and progress.taken():
                    on_resume()
                yield item
        except InterruptedWaitError:
            raise self._too_long() from None
        except QwenDistError:
            raise
        except Exception as error:
            raise log_internal_error(error, logger, request_id) from None
        finally:
            if timer is not None:
                timer.cancel()
            self._calls[progress.replica].discard(items)
            items.cancel()

    async def _in_time(self, work: Awaitable[T], deadline: float | None, progress: Progress) -> T:
        """Awaits `work`. Raises RequestError (408) if it takes until `deadline`, a time of the event loop's clock, and
        EngineDeadError if a request that lost its replica waits too long for another."""
        resume_by = None if progress.lost_s is None else progress.lost_s + self.resume_timeout_s
        end = min((each for each in (deadline, resume_by) if each is not None), default=None)
        try:
            async with asyncio.timeout_at(end) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            if end == resume_by:
                raise self._not_resumed(progress) from None
            raise self._too_long() from None

    def _too_long(self) -> RequestError:
        return RequestError(
            f"the request took longer than {self.timeout_s:g} seconds; ask for fewer tokens",
            status=HTTPStatus.REQUEST_TIMEOUT,
        )


def _after_loss(request: Any, progress: Progress) -> Any:
    """The request, which has lost its replica: a suspect if that ran it, and without a limit of its wait in a queue if
    it has begun. One that is not streamed may have begun as soon as a replica had it, unless that told that it waits.
    """
    if not isinstance(request, GenerationRequest | PoolingRequest):
        return request
    terms = dataclasses.replace(request.terms, suspect=uuid4().hex if progress.deaths else "")
    if not progress.waits and (progress.accepted if request.stream else progress.ran):
        terms = dataclasses.replace(terms, queue_timeout_s=0.0)
    return dataclasses.replace(request, terms=terms)


async def _with_pings(items: AsyncGenerator[Any, None], ping: bytes) -> AsyncGenerator[Any, None]:
    """The `items`, and pings while the first of them is awaited."""
    async with contextlib.aclosing(items):
        first = asyncio.ensure_future(anext(items, None))
        try:
            while not first.done():
                await asyncio.wait([first], timeout=_PING_PERIOD_S)
                if not first.done():
                    yield ping
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        if first.result() is not None:
            yield first.result()
        async for item in items:
            yield item


def part_of(status: int, body: bytes) -> bytes:
    """The part of a stream that a pair of status and body holds. Raises RequestError for an error, whose status comes
    too late."""
    if status == HTTPStatus.OK:
        return body
    error = pydantic_core.from_json(body)["error"]
    raise RequestError(error["message"], error.get("param"), status, error.get("code"))
