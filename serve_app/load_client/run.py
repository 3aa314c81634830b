"""Sends requests at their times, with a limit on how many are in flight."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Awaitable, Callable, Sequence

from serve_app.load_client.client import Outcome
from serve_app.load_client.datasets import Sample

_SPARE_FILES = 256


async def run_load(
    send: Callable[[Sample], Awaitable[Outcome]],
    samples: Sequence[Sample],
    times: Sequence[float],
    max_concurrency: int | None,
    clock: Callable[[], float],
    done: Callable[[], object] = lambda: None,
) -> tuple[list[Outcome], float]:
    """Outcomes in the order of `samples`, and the seconds from the start to the end of the last request.

    `times` are seconds from the start, ascending. A request that is due while `max_concurrency` are in flight waits;
    its TTFT and latency count from when it is sent, and `queued` says how long it waited. `done` is called after each.
    """
    _allow_connections(max_concurrency or len(samples))
    room = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    begun = clock()

    async def one(sample: Sample, due: float) -> Outcome:
        async with room:
            outcome = await send(sample)
        outcome.queued = outcome.started - due
        done()
        return outcome

    tasks = []
    for sample, at in zip(samples, times, strict=True):
        wait = begun + at - clock()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(sample, clock())))
    outcomes = await asyncio.gather(*tasks)
    return list(outcomes), clock() - begun


def _allow_connections(count: int) -> None:
    """Raises this process's limit of open files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
