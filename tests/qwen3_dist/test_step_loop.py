"""The order in which a rank launches steps, waits for them and answers, on a device that ends steps when told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.channel import Channel
from qwen3_dist.protocol.messages import Answer, Call
from qwen3_dist.worker.own_time import OwnTime
from qwen3_dist.worker.step_loop import Activity, run_steps


@dataclass(frozen=True)
class Plan:
    step: int


class Device:
    """Steps run here until `finish`; `log` is what a rank did, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.finished: set[int] = set()
        self.own_time = OwnTime(ParallelContext.single())

    def launch(self, plan: Plan) -> Any:
        self.log.append(f"launch {plan.step}")
        return Output(self, plan.step)

    def ask(self, question: str) -> str:
        self.log.append(question)
        return f"{question}!"

    def wait_for(self, event: str) -> None:
        deadline = time.monotonic() + 30
        while event not in self.log:
            assert time.monotonic() < deadline, (event, self.log)
            time.sleep(0.001)


class Output:
    def __init__(self, device: Device, step: int) -> None:
        self._device, self._step = device, step

    def ready(self) -> bool:
        return self._step in self._device.finished

    def result(self) -> int:
        while not self.ready():
            time.sleep(0.001)
        self._device.log.append(f"result {self._step}")
        return self._step


class Rank:
    """The engine's end of a rank whose loop runs in a thread."""

    def __init__(self, overlaps: bool) -> None:
        ours, theirs = _connected()
        self.channel, self.device = ours, Device()
        self.thread = threading.Thread(target=run_steps, args=(theirs, self.device, overlaps, Activity()))
        self.thread.start()


def _connected() -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return Channel(ours), Channel(server.accept()[0])


@pytest.fixture(params=[True, False])
def rank(request: pytest.FixtureRequest) -> Iterator[Rank]:
    rank = Rank(request.param)
    yield rank
    rank.device.finished |= set(range(9))
    rank.channel.send(None)
    rank.thread.join(30)
    assert not rank.thread.is_alive()


@pytest.mark.parametrize("rank", [True], indirect=True)
def test_a_plan_that_comes_while_a_step_runs_is_launched_before_the_step_ends(rank: Rank) -> None:
    rank.channel.send(Plan(1))
    rank.device.wait_for("launch 1")
    rank.channel.send(Plan(2))
    rank.device.wait_for("launch 2")  # which it never does if the rank waits for step 1
    assert rank.device.log == ["launch 1", "launch 2"]
    rank.device.finished.add(1)
    assert rank.channel.receive(30) == 1
    rank.device.finished.add(2)
    assert rank.channel.receive(30) == 2


def test_an_idle_engine_gets_a_result_without_another_plan(rank: Rank) -> None:
    rank.device.finished.add(1)
    rank.channel.send(Plan(1))
    assert rank.channel.receive(30) == 1


@pytest.mark.parametrize("rank", [True], indirect=True)
def test_a_call_is_answered_after_the_results_of_steps_before_it(rank: Rank) -> None:
    for message in (Plan(1), Plan(2), Call("ask", ("why",)), Plan(3)):
        rank.channel.send(message)
    rank.device.finished |= {1, 2, 3}
    received = [rank.channel.receive(30) for _ in range(4)]
    assert received == [1, 2, Answer("why!"), 3]
    order = [event for event in rank.device.log if not event.startswith("result")]
    assert order == ["launch 1", "launch 2", "why", "launch 3"]


@pytest.mark.parametrize("rank", [False], indirect=True)
def test_where_a_launch_is_the_step_its_result_goes_out_before_the_next(rank: Rank) -> None:
    rank.device.finished |= {1, 2}
    for step in (1, 2):
        rank.channel.send(Plan(step))
    assert [rank.channel.receive(30) for _ in range(2)] == [1, 2]
    assert rank.device.log == ["launch 1", "result 1", "launch 2", "result 2"]
