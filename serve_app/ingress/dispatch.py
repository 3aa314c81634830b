"""Sends requests to replicas, retries those whose replica was lost, and enforces the request timeout."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeVar

import grpc
import pydantic_core
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from serve_app.apis.shared.answer import Counted
from serve_app.failures import log_internal_error
from serve_app.ingress.part_client import PartClient
from serve_app.part_frames import PartsAt
from serve_app.telemetry.summary import LastPart, RequestSummary

T = TypeVar("T")
logger = logging.getLogger("ray.serve")
# Waits between retries. Together long enough for a replica whose engine died to have left.
PAUSES_S = (0.1, 0.3, 1.0, 2.0)
# If a client leaves, Serve cancels the calls of its request to replicas, and about then the request itself.
CLIENT_LEAVES_S = 0.2
_LOST = "the replica that ran this request was lost; send it again"
_ACCEPTED = (HTTPStatus.OK, b"")
_LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Dispatcher:
    """Sends requests to replicas with `send`, which takes a request and its id and returns the answer's items: a pair
    of HTTP status and body, then the parts of a stream.

    A request may take `timeout_s` seconds, retries included; 0 means no limit. `on_loss` is called for each lost
    replica.
    """

    def __init__(
        self,
        send: Callable[..., Any],
        timeout_s: float = 0.0,
        on_loss: Callable[[], None] = lambda: None,
        pauses_s: tuple[float, ...] = PAUSES_S,
    ) -> None:
        self._send = send
        self.timeout_s = timeout_s
        self._on_loss = on_loss
        self._pauses_s = pauses_s
        self._parts = PartClient()

    async def answer(
        self,
        request: Any,
        request_id: str,
        *context: Any,
        charge: Callable[[int], None] = lambda tokens: None,
        on_count: Callable[[Counted], None] = lambda item: None,
        on_end: Callable[[RequestSummary], None] = lambda summary: None,
    ) -> AsyncGenerator[Any, None]:
        """The items of the answer: a pair of HTTP status and body, then the parts of a stream.

        The pair of a stream that is accepted has an empty body. Retries if the replica is lost before it has sent more
        than that. Raises EngineDeadError if it is lost later or the retries are used up, and RequestError on a timeout
        (408) or a bug (500), which is logged under `request_id`. Closing this generator cancels the request.

        `charge` is called before each item with the number of tokens that the request has used since the last one,
        `on_count` with the item and its counts, and `on_end` with the summary that a replica sends with the last item.
        `send` gets `context` too.
        """
        now = asyncio.get_running_loop().time()
        deadline = now + self.timeout_s if self.timeout_s else None
        accepted = begun = False
        for pause_s in (*self._pauses_s, None):
            try:
                tried = self._try(deadline, charge, on_count, request, request_id, *context)
                async with contextlib.aclosing(tried) as items:
                    async for item in items:
                        part = item[1] if isinstance(item, tuple) else item
                        if isinstance(part, LastPart):
                            on_end(part.summary)
                            item = (item[0], bytes(part)) if isinstance(item, tuple) else bytes(part)
                        if isinstance(item, tuple) and accepted:
                            item = part_of(*item)  # of another replica, after the first was lost
                        accepted = accepted or item == _ACCEPTED
                        begun = begun or item not in (b"", _ACCEPTED)
                        if item:
                            yield item
                return
            except EngineDeadError:
                self._on_loss()
                if begun or pause_s is None:
                    raise
            await self._in_time(asyncio.sleep(pause_s), deadline)

    async def _try(
        self,
        deadline: float | None,
        charge: Callable[[int], None],
        on_count: Callable[[Counted], None],
        request: Any,
        request_id: str,
        *context: Any,
    ) -> AsyncGenerator[Any, None]:
        """One try on one replica. Raises EngineDeadError if the replica is lost or answers that its engine died."""
        items = self._send(request, request_id, *context)
        charged = 0
        try:
            async with contextlib.aclosing(self._received(items)) as received:
                while (item := await self._in_time(anext(received, None), deadline)) is not None:
                    if isinstance(item, Counted):
                        charge(item.tokens - charged)
                        on_count(item)
                        item, charged = item.item, item.tokens
                    if isinstance(item, tuple) and item[0] == HTTPStatus.SERVICE_UNAVAILABLE:
                        raise EngineDeadError(_LOST)
                    yield item
        except QwenDistError:
            raise
        except Exception as error:
            if not is_replica_loss(error):
                raise log_internal_error(error, logger, request_id) from None
            logger.warning("request %s lost its replica: %s", request_id, error)
            raise EngineDeadError(_LOST) from None
        finally:
            with contextlib.suppress(Exception):  # cancelling raises the error of a failed request again
                items.cancel()

    async def _received(self, items: Any) -> AsyncGenerator[Any, None]:
        """The items of a call, and the parts of a stream, which come on a connection of their own."""
        while (item := await _next(items)) is not None:
            at = item.item[1] if isinstance(item, Counted) and isinstance(item.item, tuple) else None
            if not isinstance(at, PartsAt):
                yield item
                continue
            yield item._replace(item=_ACCEPTED)
            async with (
                self._parts.receive(at) as receiver,
                contextlib.aclosing(receiver.until(_next(items))) as parts,
            ):
                async for part in parts:
                    yield part

    async def _in_time(self, work: Awaitable[T], deadline: float | None) -> T:
        """Awaits `work`. Raises RequestError (408) if it takes until `deadline`, a time of the event loop's clock."""
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestError(
                f"the request took longer than {self.timeout_s:g} seconds; ask for fewer tokens",
                status=HTTPStatus.REQUEST_TIMEOUT,
            ) from None


def part_of(status: int, body: bytes) -> bytes:
    """The part of a stream that a pair of status and body holds. Raises RequestError for an error, whose status comes
    too late."""
    if status == HTTPStatus.OK:
        return body
    error = pydantic_core.from_json(body)["error"]
    raise RequestError(error["message"], error.get("param"), status, error.get("code"))


def is_replica_loss(error: Exception) -> bool:
    """Whether the error says that the replica is gone, so that another one can answer the request."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in _LOST_CODES
    return isinstance(error, RayActorError | DeploymentUnavailableError)


async def _next(items: AsyncIterator[Any]) -> Any:
    """The next item; None after the last. Raises EngineDeadError if the replica cancelled the call, not the client."""
    try:
        return await anext(items, None)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        await asyncio.sleep(CLIENT_LEAVES_S)  # where this task may be cancelled
        raise EngineDeadError(_LOST) from None
