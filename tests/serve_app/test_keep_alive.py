"""A stream that waits for its first part sends headers and comments meanwhile, and tells errors in its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from qwen3_dist.errors import EngineDeadError, RequestError
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.ingress.keep_alive import KEEP_ALIVE_COMMENT, KeepAliveStream


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
        stream = KeepAliveStream(answer.items(), 0.001)
        return await stream.first(None), [part async for part in stream]

    assert asyncio.run(run()) == ((200, b"a"), [b"b"])


def test_comments_come_ahead_of_a_late_first_part() -> None:
    async def run() -> list[bytes]:
        answer = Answer()
        stream = KeepAliveStream(answer.items(), 0.001)
        assert await stream.first(0.001) is None
        shown = [await anext(stream), await anext(stream)]
        answer.let.set()
        return shown + [part async for part in stream]

    first, second, *rest = asyncio.run(run())
    assert first == second == KEEP_ALIVE_COMMENT
    assert [part for part in rest if part != KEEP_ALIVE_COMMENT] == [b"a", b"b"]


REFUSED = error_object(RequestError("no", "input", 404, "gone"))


@pytest.mark.parametrize(
    ("first", "kind"), [((404, to_json(REFUSED)), RequestError), (EngineDeadError("lost"), EngineDeadError)]
)
def test_a_late_error_is_raised_as_it_was_told(first: Any, kind: type[Exception]) -> None:
    async def run() -> None:
        answer = Answer(first)
        stream = KeepAliveStream(answer.items(), 0.001)
        assert await anext(stream) == KEEP_ALIVE_COMMENT
        answer.let.set()
        async for part in stream:
            assert part == KEEP_ALIVE_COMMENT

    with pytest.raises(kind) as error:
        asyncio.run(run())
    if kind is RequestError:
        assert error_object(error.value) == REFUSED


def test_a_client_that_leaves_while_it_waits_cancels_its_request() -> None:
    async def run() -> bool:
        answer = Answer()
        stream = KeepAliveStream(answer.items(), 0.001)
        await stream.first(0.001)
        await stream.aclose()
        return answer.closed

    assert asyncio.run(run())
