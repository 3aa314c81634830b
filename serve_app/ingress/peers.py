"""The other ingresses of the service: how many there are, and calls to them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ray.serve.handle import DeploymentHandle

from cluster.ray_private import broadcast, running_replicas

METHOD = "answer_peer"  # of the ingress, which passes calls on to `Peers.answer`


class Told(NamedTuple):
    """What one ingress answers."""

    ingress: str
    value: Any


class Peers:
    """The ingresses of a service as `me`, the id of one of them, sees them. Used on the process's event loop.

    `find` returns the handle of the ingresses' deployment.
    """

    def __init__(self, find: Callable[[], DeploymentHandle], me: str) -> None:
        self._find, self.me = find, me
        self._handle: DeploymentHandle | None = None
        self._answers: dict[str, Callable[..., Any]] = {}

    def offer(self, name: str, answer: Callable[..., Any]) -> None:
        """Has calls of `name` answered by a plain function, which must not block."""
        self._answers[name] = answer

    def answer(self, asker: str, only: str, name: str, arguments: Sequence[Any]) -> Told | None:
        """Answers a call of the ingress `asker`: None if it is this one, or wants the answer of another."""
        if asker == self.me or only not in ("", self.me):
            return None
        return Told(self.me, self._answers[name](*arguments))

    @property
    def is_known(self) -> bool:
        """Whether Serve has told which ingresses run."""
        return bool(running_replicas(self._connected()))

    @property
    def others(self) -> list[str]:
        """The ids of the other ingresses that run."""
        return [each for each in running_replicas(self._connected()) if each != self.me]

    def count(self) -> int:
        """The number of ingresses that get requests, among which Serve's proxies spread them evenly; at least 1."""
        return max(1, len(running_replicas(self._connected())))

    async def ask(
        self, name: str, *arguments: Any, timeout_s: float, only: str = ""
    ) -> list[Told | BaseException]:
        """What the other ingresses, or the one called `only`, answer to a call of `name`.

        An exception stands for one that is lost or later than `timeout_s` seconds. Without others nothing is sent.
        """
        if not self.others:
            return []
        sent = broadcast(self._connected(), METHOD, self.me, only, name, arguments, timeout_s=timeout_s)
        # Without the context of a client's request: when its client leaves, Serve cancels what the request has called.
        task = asyncio.create_task(sent, context=contextvars.Context())
        try:
            answers = await task
        except Exception as error:  # noqa: BLE001 - Serve could ask nobody
            return [error]
        return [each for each in answers if each is not None]

    def _connected(self) -> DeploymentHandle:
        if self._handle is None:
            self._handle = self._find()
        return self._handle


def values(answers: Sequence[Told | BaseException]) -> list[Any]:
    """The values of the ingresses that answered."""
    return [each.value for each in answers if isinstance(each, Told)]
