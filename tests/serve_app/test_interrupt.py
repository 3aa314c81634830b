"""Waits that are ended from outside, without timers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app.ingress.interrupt import Interrupt, InterruptedWaitError


def run(check: Callable[[Interrupt], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await check(Interrupt())

    return asyncio.run(main())


def test_a_wait_that_nobody_ends_returns_what_it_waits_for() -> None:
    async def check(interrupt: Interrupt) -> list[int]:
        return [await interrupt.wait(asyncio.sleep, 0, number) for number in range(3)]

    assert run(check) == [0, 1, 2]


def test_the_wait_of_now_ends_and_so_do_those_to_come_and_the_task_goes_on() -> None:
    async def check(interrupt: Interrupt) -> None:
        asyncio.get_running_loop().call_soon(interrupt.fire)
        for _ in range(2):
            with pytest.raises(InterruptedWaitError):
                await interrupt.wait(asyncio.Event().wait)
        task = asyncio.current_task()
        assert task is not None and not task.cancelling()
        await asyncio.sleep(0)

    run(check)


def test_what_the_task_does_between_two_waits_is_not_ended() -> None:
    async def check(interrupt: Interrupt) -> None:
        await interrupt.wait(asyncio.sleep, 0)
        asyncio.get_running_loop().call_soon(interrupt.fire)
        await asyncio.sleep(0.001)
        with pytest.raises(InterruptedWaitError):
            await interrupt.wait(asyncio.sleep, 0)

    run(check)


def test_a_task_that_is_cancelled_too_is_cancelled() -> None:
    async def check(interrupt: Interrupt) -> None:
        waiting = asyncio.create_task(interrupt.wait(asyncio.Event().wait))
        await asyncio.sleep(0)
        waiting.cancel()
        interrupt.fire()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(check)


def test_the_error_of_what_is_awaited_is_raised() -> None:
    async def fail() -> None:
        raise OSError("gone")

    async def check(interrupt: Interrupt) -> None:
        with pytest.raises(OSError, match="gone"):
            await interrupt.wait(fail)

    run(check)
