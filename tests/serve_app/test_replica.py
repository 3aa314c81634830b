"""A replica on which something breaks: what it answers, what it logs, when it leaves. No Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import os
import pickle
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError
from qwen3_dist.settings import EngineConfig
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.shared.answer import DIED, LEFT, Running
from serve_app.apis.shared.resume import Resume
from serve_app.replica.deployment import EngineReplica
from serve_app.replica.record import RequestRecord
from serve_app.replica.request_handler import RequestHandler
from serve_app.replica.request_server import RequestServer
from serve_app.request_frames import COMMAND, LENGTH, START, Item, ReplicaAddress
from serve_app.settings import TelemetrySettings
from serve_app.telemetry.logs import configure_logs
from tests.serve_app.resuming import Replica, answered

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def serve_log(tmp_path: Path) -> Iterator[Path]:
    """The file that Serve's logger writes to, through a buffer as Serve does."""
    file = tmp_path / "replica_of_test.log"
    target = logging.FileHandler(file)
    handler = logging.handlers.MemoryHandler(100, flushLevel=logging.ERROR, target=target)
    logging.getLogger("ray.serve").addHandler(handler)
    library = logging.getLogger("qwen3_dist")
    handlers = list(library.handlers)
    configure_logs(TelemetrySettings(), "test")
    yield file
    library.handlers, library.propagate = handlers, True
    logging.getLogger("ray.serve").removeHandler(handler)
    target.close()


class Broken:
    """A handler with a bug."""

    async def whole(
        self, request: Any, record: RequestRecord, resume: Resume | None = None
    ) -> AsyncGenerator[bytes, None]:
        raise TypeError("secret")
        yield b""

    async def stream(
        self, request: Any, record: RequestRecord, resume: Resume | None = None
    ) -> AsyncGenerator[bytes, None]:
        raise TypeError("secret")
        yield b""


class Healthy:
    """An engine of which nothing else is asked."""

    async def recovered(self) -> None:
        pass


def replica_with(handler: Any, engine: Any = None) -> EngineReplica:
    replica = Replica.__new__(Replica)
    replica._engine, replica._handler = engine or Healthy(), handler
    replica._num_answering = 0
    replica._name = "r1"
    return replica


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("parse", "kind"), [(parse_chat, "server_error"), (parse_messages, "api_error")])
def test_a_bug_is_500_in_the_apis_form_with_the_requests_id_and_the_logs_name(
    serve_log: Path, parse: Any, kind: str, stream: bool
) -> None:
    request = parse(json.dumps({"messages": USER, "max_tokens": 5, "stream": stream}).encode())
    [(status, body)] = answered(replica_with(Broken()), request)
    error = json.loads(body)["error"]
    assert (status, error["type"]) == (500, kind)
    assert "request-7" in error["message"] and serve_log.name in error["message"]
    assert "secret" not in error["message"]
    logged = serve_log.read_text()
    assert "request-7" in logged and "Traceback" in logged and "TypeError: secret" in logged


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_says_that_it_has_a_request_before_the_request_can_kill_it(stream: bool) -> None:
    request = parse_chat(json.dumps({"messages": USER, "stream": stream}).encode())

    async def first() -> Any:
        return await anext(replica_with(Broken()).answer(request, "request-7"))

    assert asyncio.run(first()) == Running("r1")


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_that_it_has_a_request_leaves_the_process_before_the_request_is_looked_at(new_loop: Any) -> None:
    heard = threading.Event()

    async def answer(*_: Any, **options: Any) -> AsyncGenerator[Any, None]:
        yield Running("r1")
        yield heard.wait(20)  # the event loop stands still meanwhile

    def ask(address: ReplicaAddress) -> bytes:
        with socket.create_connection((address.host, address.port), 20) as connection:
            payload = pickle.dumps((("request", "request-7"), {}))
            connection.sendall(address.secret + COMMAND.pack(START, 1, len(payload)) + payload)
            first = connection.recv(1000)
            heard.set()
            return first

    async def scenario() -> bytes:
        return await asyncio.to_thread(ask, await RequestServer("127.0.0.1", answer).start())

    with asyncio.Runner(loop_factory=new_loop) as runner:
        frame = runner.run(scenario())
    assert heard.is_set() and pickle.loads(frame[LENGTH.size :]) == [(1, Item(Running("r1")))]


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    died = threading.Event()
    engine = AsyncEngine(
        EngineConfig(device="cpu", dtype="float32", num_blocks=256), on_death=lambda: died.set()
    )
    engine.died = died  # type: ignore[attr-defined]
    yield engine
    engine.shutdown()


def broken_step() -> Any:
    raise TypeError("a step went wrong")


def test_an_engine_that_fails_says_where_its_traceback_is_and_that_it_died(
    engine: AsyncEngine, serve_log: Path
) -> None:
    replica = replica_with(RequestHandler(engine, "m", {}), engine)
    engine._engine.step = broken_step  # type: ignore[method-assign]
    assert answered(replica, parse_completion(b'{"prompt": [5], "max_tokens": 5}')) == [(503, DIED)]
    logged = serve_log.read_text()
    assert "TypeError: a step went wrong" in logged
    assert "the engine failed as it ran request-7-" in logged
    assert engine.died.wait(60)  # type: ignore[attr-defined]
    with pytest.raises(EngineDeadError):
        engine.check_health()


def test_parts_come_with_the_number_of_tokens_used_so_far(engine: AsyncEngine) -> None:
    replica = replica_with(RequestHandler(engine, "m", {}))
    body = {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 4, "ignore_eos": True}
    *told, ((_, answer), count, *_) = answered(replica, parse_completion(json.dumps(body).encode()))
    assert count == json.loads(answer)["usage"]["total_tokens"] == told[-1].tokens == 3 + 4 * 4
    assert told[0].tokens < count and {part.item for part in told} == {b""}
    parts = answered(replica, parse_completion(json.dumps({**body, "stream": True}).encode()))
    counts = [part.tokens for part in parts]
    assert (
        parts[0][:2] == ((200, b""), 0)
        and 3 < counts[1] < counts[-1] == 3 + 4 * 4
        and counts == sorted(counts)
    )
    [((_, answer), count, *_)] = answered(replica, parse_embedding(b'{"input": [[5, 6, 7], [8]]}'))
    assert count == json.loads(answer)["usage"]["total_tokens"] == 4


def test_a_shutdown_is_no_death(engine: AsyncEngine) -> None:
    engine.shutdown()
    assert not engine.died.is_set()  # type: ignore[attr-defined]


def test_a_replica_leaves_once_it_has_answered_those_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_with(Broken())
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    request = parse_chat(json.dumps({"messages": USER}).encode())

    async def answer_late() -> None:
        answer = replica.answer(request, "id")
        await anext(answer)
        leaving = threading.Thread(target=replica._exit_process)
        leaving.start()
        assert not left
        await answer.aclose()
        await asyncio.to_thread(leaving.join)

    asyncio.run(answer_late())
    assert left == [1]


def test_a_replica_that_serve_ends_finishes_what_it_has_and_takes_nothing_more(engine: AsyncEngine) -> None:
    replica = replica_with(RequestHandler(engine, "m", {}), engine)
    body = {"prompt": [5], "max_tokens": 50, "ignore_eos": True, "stream": True}
    request = parse_completion(json.dumps(body).encode())

    async def end() -> tuple[list[Any], list[Any]]:
        answer = replica.answer(request, "request-7")
        begun = [await anext(answer), await anext(answer)]
        ending = asyncio.ensure_future(EngineReplica.__del__(replica) or asyncio.sleep(0))
        refused = [item async for item in replica.answer(request, "request-8")]
        begun += [item async for item in answer]
        await ending
        return begun, refused

    begun, refused = asyncio.run(end())
    assert refused == [(503, LEFT)]
    assert begun[-1].tokens == 51 and bytes(begun[-1].item).endswith(b"data: [DONE]\n\n")
    with pytest.raises(EngineDeadError):
        engine.check_health()


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_is_told_to_leave_passes_its_requests_on(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    replica = replica_with(RequestHandler(engine, "m", {}), engine)
    left = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: left.set())
    body = {"prompt": [5], "max_tokens": 1500, "ignore_eos": True, "stream": stream}
    run = engine._engine.step

    async def tell() -> list[bool]:
        return [await replica.leave("another"), await replica.leave("r1"), await replica.leave("r1")]

    def step() -> Any:
        if not replica._leaves:
            assert asyncio.run(tell()) == [False, True, True]
        return run()

    engine._engine.step = step  # type: ignore[method-assign]
    last = answered(replica, parse_completion(json.dumps(body).encode()))[-1]
    assert last == (503, LEFT)
    assert left.wait(60)
    assert not engine.died.is_set()  # type: ignore[attr-defined]
    assert answered(replica, parse_completion(b'{"prompt": [5]}')) == [(503, LEFT)]
