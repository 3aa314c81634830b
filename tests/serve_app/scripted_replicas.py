"""Replicas that answer the ingress's calls from a script."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from serve_app.apis.shared.answer import Running
from serve_app.apis.shared.resume import Resume
from serve_app.ingress.dispatch import Dispatcher

REQUEST = SimpleNamespace(ping=b": ping\n\n")
WHOLE = [(200, b"head"), b"part"]
RUNNING = Running("r1")
DEAD = (503, b"the engine died")
ACCEPTED = (200, b"")


class Answer:
    """Items of a replica; those that are exceptions are raised, those that are functions awaited."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self.cancelled = False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        item = next(self._items, StopAsyncIteration())
        if isinstance(item, BaseException):
            raise item
        if callable(item):
            await item()
            return await anext(self)
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """Each request gets the next of `answers`."""

    def __init__(self, *answers: Iterable[Any]) -> None:
        self.answers = [Answer(items) for items in answers]
        self.asked: list[str] = []
        self.requests: list[Any] = []
        self.losses = 0
        self.lost: list[tuple[str, bool]] = []
        self.resumes: list[Resume | None] = []

    def send(self, request: Any, request_id: str, resume: Resume | None = None) -> Answer:
        self.asked.append(request_id)
        self.requests.append(request)
        self.resumes.append(copy.deepcopy(resume))
        return self.answers[len(self.asked) - 1]

    def lose(self, replica: str, is_dead: bool) -> None:
        self.losses += 1
        self.lost.append((replica, is_dead))

    def got(
        self, timeout_s: float = 0.0, pauses_s: tuple[float, ...] = (0.0,), resume_s: float = 60.0
    ) -> list[Any]:
        dispatcher = Dispatcher(self.send, timeout_s, self.lose, pauses_s, resume_s)

        async def collect() -> list[Any]:
            return [item async for item in dispatcher.answer(REQUEST, "id")]

        return asyncio.run(collect())
