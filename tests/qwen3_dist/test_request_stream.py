"""What the engine's thread hands to the event loop: which streams go on first, and how many at once."""

from __future__ import annotations

import asyncio
import math
import threading

from qwen3_dist.engine.request_stream import RequestStream, send_due
from qwen3_dist.protocol.outputs import TokenDelta


def test_first_parts_of_streams_are_sent_before_all_others_go_on() -> None:
    async def scenario() -> list[int]:
        streams = [RequestStream(asyncio.get_running_loop()) for _ in range(20)]
        order: list[int] = []

        async def read(number: int) -> None:
            for _ in range(1 if number == 19 else 2):
                await streams[number].next_deltas()
                if number == 19:
                    asyncio.get_running_loop().call_soon(order.append, number)  # as what was put is sent
                else:
                    order.append(number)

        readers = [asyncio.create_task(read(number)) for number in range(20)]
        await asyncio.sleep(0)
        for step in (streams[:19], streams):  # the last one has come after the first step
            order.clear()
            for stream in step:
                stream.held = [TokenDelta(0, (1,), (None,), None)]
            send_due(streams, math.inf)
            while len(order) < len(step):
                await asyncio.sleep(0)
        await asyncio.gather(*readers)
        return order

    assert asyncio.run(scenario()) == [19, *range(19)]


def test_the_engine_is_told_when_an_event_loop_has_sent_first_parts() -> None:
    async def scenario() -> list[bool]:
        loop, taken = asyncio.get_running_loop(), threading.Event()
        stream = RequestStream(loop)
        told = [send_due([stream], math.inf, taken)]
        stream.held = [TokenDelta(0, (1,), (None,), None)]

        async def read() -> None:
            await stream.next_deltas()
            loop.call_soon(lambda: told.append(taken.is_set()))  # as what was put is sent

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        told.append(send_due([stream], math.inf, taken))
        await reader
        while not taken.is_set():
            await asyncio.sleep(0)
        stream.held = [TokenDelta(0, (2,), (None,), None)]
        return [*told, send_due([stream], math.inf, taken), taken.is_set()]

    assert asyncio.run(scenario()) == [False, True, False, False, False]


def test_what_else_the_event_loop_has_to_do_waits_for_a_few_streams_alone() -> None:
    async def scenario() -> list[int]:
        streams = [RequestStream(asyncio.get_running_loop()) for _ in range(100)]

        def send_to_all() -> list[asyncio.Task[list[TokenDelta]]]:
            for stream in streams:
                stream.held = [TokenDelta(0, (1,), (None,), None)]
            readers = [asyncio.create_task(stream.next_deltas()) for stream in streams]
            asyncio.get_running_loop().call_soon(send_due, streams, math.inf)
            return readers

        await asyncio.gather(*send_to_all())  # the first parts
        readers, done = send_to_all(), [0]
        while done[-1] < len(streams):
            await asyncio.sleep(0)
            done.append(sum(reader.done() for reader in readers))
        return [after - before for before, after in zip(done, done[1:], strict=False)]

    assert max(asyncio.run(scenario())) <= 20
