"""Streams that are cut and go on at another replica, apart from Ray and HTTP."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_dist.engine.async_engine import AsyncEngine
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.requests import AnyRequest
from serve_app.apis.responses.request import parse_responses
from serve_app.apis.shared.answer import Counted, Identity, Running
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.resume import Resume
from serve_app.metrics.requests import RequestMetrics
from serve_app.replica.deployment import EngineReplica
from serve_app.replica.request_handler import RequestHandler

HELLO = [{"role": "user", "content": "Tell me a story about a fox."}]
PARSERS = {
    "chat": (parse_chat, {"messages": HELLO, "max_tokens": 40}),
    "completions": (parse_completion, {"prompt": "the sea", "max_tokens": 24}),
    "messages": (parse_messages, {"messages": HELLO, "max_tokens": 40}),
    "responses": (parse_responses, {"input": HELLO, "max_output_tokens": 40}),
}


def asked(api: str, **fields: Any) -> GenerationRequest:
    """A parsed request for a stream, as the ingress accepts it; the same whenever it is asked."""
    parse, body = PARSERS[api]
    request = parse(json.dumps({**body, "stream": True, **fields}).encode())
    return replace(request, identity=Identity("0123456789abcdef" * 2, 1_700_000_000, 2**40))


class Replica(EngineReplica):
    """A replica whose engine outlives it."""

    def __del__(self) -> None:
        pass


def replica_of(engine: AsyncEngine, metrics: RequestMetrics | None = None, **defaults: Any) -> EngineReplica:
    """A replica whose answers are greedy by default."""
    replica = Replica.__new__(Replica)
    replica._handler = RequestHandler(engine, "m", {"temperature": 0, **defaults}, metrics=metrics)
    replica._engine, replica._num_answering, replica._name = engine, 0, "r"
    return replica


@dataclass
class Client:
    """What a client of a stream got, part by part, and the numbers of tokens that came with them."""

    request: GenerationRequest
    model: str = ""
    parts: list[Counted] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        return b"".join(bytes(part.item) for part in self.parts)

    @property
    def resume(self) -> Resume:
        """What the ingress remembers."""
        resume = Resume(self.model)
        for part in self.parts:
            resume.add(part.sent)
        return resume

    def up_to(self, cut: int) -> Client:
        """The client after the first `cut` parts."""
        return replace(self, parts=self.parts[:cut])

    def read(self, replica: EngineReplica) -> Client:
        """The client after it has read the rest of the stream from `replica`."""
        first, *rest = answered(replica, self.request, self.resume if self.parts else None)
        assert isinstance(first, Counted) and first.item == (200, b""), first
        assert all(isinstance(part, Counted) for part in rest), rest[-1]
        return replace(self, model=first.model, parts=[*self.parts, *rest])


def answered(replica: EngineReplica, request: AnyRequest, resume: Resume | None = None) -> list[Any]:
    """The items and parts that a replica gives to the ingress."""

    async def collect() -> list[Any]:
        given = pickle.loads(pickle.dumps((request, resume)))
        items = replica.answer(given[0], "request-7", {}, given[1])
        return [item async for item in items if not isinstance(item, Running)]

    return asyncio.run(collect())


def by_choice(data: bytes) -> dict[int, list[bytes]]:
    """The events of each choice, in order; -1 has those without a choice."""
    found: dict[int, list[bytes]] = defaultdict(list)
    for event in data.removesuffix(b"\n\n").split(b"\n\n"):
        body = event.rpartition(b"data: ")[2]
        choices = json.loads(body).get("choices", []) if body != b"[DONE]" else []
        found[choices[0]["index"] if choices else -1].append(event)
    return found
