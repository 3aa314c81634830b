"""A stream that waits for its first part sends headers and comments meanwhile, and tells errors in its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from qwen3_dist.errors import EngineDeadError, RequestError
from serve_app.apis.shared.answer import PING
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.ingress.keep_alive import KeepAliveStream, headers_after_s


class Answer:
    """An answer that begins once it is `let` to."""

    def __init__(self, first: Any = (200, b"a")) -> None:
        self._first = first
        self.let = asyncio.Event()
        self.closed = False

    async def items(self) -> AsyncGenerator[Any, None]:
        try:
            await self.let.wait()
            if isinstance(self._first, Exception):
                raise self._first
            yield self._first
            yield b"b"
        finally:
            self.closed = True


def test_a_first_part_that_is_there_in_time_is_no_late_one() -> None:
    async def run() -> tuple[Any, list[bytes]]:
        answer = Answer()
        answer.let.set()
        stream = KeepAliveStream(answer.items(), period_s=0.001)
        return await stream.first(None), [part async for part in stream]

    assert asyncio.run(run()) == ((200, b"a"), [b"b"])


def test_headers_wait_for_the_queue_timeout() -> None:
    assert headers_after_s(0.0) == headers_after_s(1.0) == 3.0
    assert headers_after_s(30.0) > 30.0


def test_comments_come_ahead_of_a_late_first_part() -> None:
    async def run() -> list[bytes]:
        answer = Answer()
        stream = KeepAliveStream(answer.items(), period_s=0.001)
        assert await stream.first(0.001) is None
        shown = [await anext(stream), await anext(stream)]
        answer.let.set()
        return shown + [part async for part in stream]

    first, second, *rest = asyncio.run(run())
    assert first == second == PING
    assert [part for part in rest if part != PING] == [b"a", b"b"]


def test_pings_go_on_after_a_stream_is_accepted_until_its_first_part() -> None:
    async def items(let: asyncio.Event) -> AsyncGenerator[Any, None]:
        yield 200, b""
        await let.wait()
        yield b"a"
        yield b"b"

    async def run() -> list[bytes]:
        let = asyncio.Event()
        stream = KeepAliveStream(items(let), b"P", period_s=0.001)
        assert await stream.first(None) == (200, b"")
        parts = [await anext(stream), await anext(stream)]
        let.set()
        return parts + [part async for part in stream]

    first, second, *rest = asyncio.run(run())
    assert first == second == b"P"
    assert [part for part in rest if part != b"P"] == [b"a", b"b"]


REFUSED = error_object(RequestError("no", "input", 404, "gone"))


@pytest.mark.parametrize(
    ("first", "kind"), [((404, to_json(REFUSED)), RequestError), (EngineDeadError("lost"), EngineDeadError)]
)
def test_a_late_error_is_raised_as_it_was_told(first: Any, kind: type[Exception]) -> None:
    async def run() -> None:
        answer = Answer(first)
        stream = KeepAliveStream(answer.items(), period_s=0.001)
        assert await anext(stream) == PING
        answer.let.set()
        async for part in stream:
            assert part == PING

    with pytest.raises(kind) as error:
        asyncio.run(run())
    if kind is RequestError:
        assert error_object(error.value) == REFUSED


def test_a_client_that_leaves_while_it_waits_cancels_its_request() -> None:
    async def run() -> bool:
        answer = Answer()
        stream = KeepAliveStream(answer.items(), period_s=0.001)
        await stream.first(0.001)
        await stream.aclose()
        return answer.closed

    assert asyncio.run(run())
