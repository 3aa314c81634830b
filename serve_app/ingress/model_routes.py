"""The models that the ingress answers for, each with the way to its replicas."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from ray.serve.handle import DeploymentHandle

from cluster.ray_private import broadcast, running_replicas
from qwen3_dist.errors import EngineDeadError, RequestError
from serve_app.apis.models import model_not_found, one_of
from serve_app.ingress.admission import Admission, QueueFullError
from serve_app.ingress.dispatch import Dispatcher
from serve_app.ingress.replica_calls import ReplicaCalls
from serve_app.ingress.replica_health import ANSWER_TIMEOUT_S, Poll, ReplicaHealth
from serve_app.ingress.replica_table import ReplicaTable
from serve_app.settings import IngressConfig, IngressSettings, ServedModel

State = Literal["starting", "ready", "asleep", "sleeping", "unhealthy"]
_ANSWER_TIMEOUT_S = 5.0
_BYTES_OF_TOKEN = 4  # of a body, about


@dataclass
class ModelRoute:
    """One model: how many requests its replicas take, whether they are healthy, and the way to them."""

    model: ServedModel
    replicas: DeploymentHandle
    dispatcher: Dispatcher
    health: ReplicaHealth
    num_ingresses: Callable[[], int] = lambda: 1
    admission: Admission = field(init=False)
    max_queued_requests: int = 0
    max_queued_tokens: int | None = None
    _longest: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.max_in_flight, self.model.max_ongoing_requests, self.num_ingresses)

    def configure(self, model: ServedModel, settings: IngressSettings) -> None:
        """Takes up changed settings of the model and of the ingress."""
        self.model, self.max_queued_requests = model, settings.max_queued_requests
        self.max_queued_tokens = settings.max_queued_tokens
        self.admission.max_per_request = model.max_ongoing_requests
        self.dispatcher.timeout_s = settings.request_timeout_s
        self.dispatcher.resume_timeout_s = settings.resume_timeout_s
        self.health.period_s, self.health.patience_s = health_times(model)

    @property
    def answers(self) -> bool:
        """Whether a request sent now would be answered."""
        return self.state in ("ready", "asleep")

    @property
    def state(self) -> State:
        """Ready if a replica was healthy at the last poll, unhealthy if one ever was and none is now. A model that may
        have no replica is asleep instead: the next request starts one. One that was put to sleep is sleeping."""
        if self.health.num_healthy:
            return "sleeping" if self.model.asleep else "ready"
        if not self.model.min_replicas:
            return "asleep"
        return "unhealthy" if self.health.was_healthy else "starting"

    def require_awake(self) -> None:
        """Raises RequestError (503) if the model was put to sleep."""
        if self.model.asleep:
            raise RequestError(
                f"{self.model.name!r} was put to sleep; POST /v1/cluster/wake wakes it",
                param="model",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
            )

    def capacity(self) -> int:
        """Sequences in flight that the replicas take together, or the one that the next request starts."""
        return max(1, self.health.num_healthy, self.model.min_replicas) * self.model.max_ongoing_requests

    def max_in_flight(self) -> int:
        """Sequences that may be in flight or wait in all ingresses together."""
        return self.capacity() + self.max_queued_requests

    def queue(self, body_bytes: int) -> None:
        """Counts the tokens of a request as waiting, until the next poll tells how many do. Raises QueueFullError if
        others wait and there would be too many."""
        waiting, tokens = self.health.queued_tokens, body_bytes // _BYTES_OF_TOKEN
        limit = (self.max_queued_tokens or math.inf) * max(1, self.health.num_healthy)
        if waiting and waiting + tokens > limit:
            raise QueueFullError(waiting, self.admission.retry_after_s())
        self.health.queued_tokens += tokens

    async def ask_all(self, method: str) -> list[Any]:
        """What every replica answers to a call without arguments. Raises EngineDeadError if one is lost."""
        try:
            return await self.replicas.broadcast(method).results_async()
        except Exception as error:
            raise EngineDeadError(
                f"a replica of {self.model.name!r} was lost or could not answer; ask again"
            ) from error

    async def ask_each(self, method: str, timeout_s: float) -> list[Any]:
        """As `ask_all`, but with the exception of each replica that is lost or answers later than `timeout_s` seconds.

        In a thread, where Serve limits the time of each replica by itself.
        """

        def ask() -> list[Any]:
            return self.replicas.broadcast(method).results(timeout_s=timeout_s, return_exceptions=True)

        try:
            return await asyncio.to_thread(ask)
        except Exception as error:  # noqa: BLE001 - Serve could ask nobody
            return [error]

    async def check_layout(self, layout: str, min_replicas: int | None) -> None:
        """Raises RequestError if the model cannot have `layout` with so many replicas, by default as many as it has;
        EngineDeadError if no replica can tell."""
        least = max(1, self.model.min_replicas if min_replicas is None else min_replicas)
        told: list[Any] = []
        if running_replicas(self.replicas):
            told = await broadcast(self.replicas, "check_layout", layout, least, timeout_s=_ANSWER_TIMEOUT_S)
        problems = [each for each in told if isinstance(each, str)]
        if not problems:
            raise EngineDeadError(
                f"no replica of {self.model.name!r} can tell whether the layout fits; ask again"
            )
        if problems[0]:
            raise RequestError(problems[0], param="layout")

    async def longest(self) -> int | None:
        """Most tokens of prompt and answer together that every replica takes; while none tells it, what was told last.

        Replicas are asked each time: a changed engine has another limit, and no ingress hears of the change.
        """
        told = await self.ask_each("max_model_len", _ANSWER_TIMEOUT_S)
        self._longest = min((each for each in told if isinstance(each, int)), default=self._longest)
        return self._longest


class ModelRoutes:
    """The routes by the names of models and of their adapters.

    `find_replicas` returns the handle of a model's replicas, `num_ingresses` the number of ingresses that share them.
    """

    def __init__(
        self,
        find_replicas: Callable[[ServedModel], DeploymentHandle],
        num_ingresses: Callable[[], int] = lambda: 1,
    ) -> None:
        self._find_replicas, self._num_ingresses = find_replicas, num_ingresses
        self._routes: dict[tuple[str, str], ModelRoute] = {}
        self._by_name: dict[str, ModelRoute] = {}

    def __iter__(self) -> Iterator[ModelRoute]:
        return iter(self._routes.values())

    def __contains__(self, name: str) -> bool:
        """Whether a model or an adapter is called `name`."""
        return name in self._by_name

    def configure(self, config: IngressConfig) -> None:
        """Takes up the models of `config`. A model that was there keeps its route, and what is known of it."""
        routes: dict[tuple[str, str], ModelRoute] = {}
        by_name: dict[str, ModelRoute] = {}
        for model in config.models:
            key = (model.application, model.name)
            routes[key] = route = self._routes.get(key) or self._new_route(model)
            by_name |= dict.fromkeys((model.name, *model.adapters), route)
        gone = [route for key, route in self._routes.items() if key not in routes]
        self._routes, self._by_name = routes, by_name
        for model, route in zip(config.models, routes.values(), strict=True):
            route.configure(model, config.settings)
        for route in gone:
            route.health.stop()

    def find(self, name: str) -> ModelRoute:
        """The route of the model or adapter called `name`; without a name, of the only model. Raises RequestError."""
        if not name and len(self._routes) == 1:
            return next(iter(self._routes.values()))
        if name in self._by_name:
            return self._by_name[name]
        names = list(self._by_name)
        if not name:
            raise RequestError(f"model is required; use {one_of(names)}", param="model")
        raise model_not_found(name, names)

    def max_in_flight(self) -> int:
        """Sequences that may be in flight or wait, of all models together."""
        queued = max((route.max_queued_requests for route in self), default=0)
        return sum(route.capacity() for route in self) + queued

    def _new_route(self, model: ServedModel) -> ModelRoute:
        replicas = self._find_replicas(model)

        async def poll() -> Poll:
            running = running_replicas(replicas)
            if not running:  # Serve would wait for one
                return Poll((), [])
            return Poll(running, await broadcast(replicas, "status", timeout_s=ANSWER_TIMEOUT_S))

        table = ReplicaTable()
        calls = ReplicaCalls(replicas, table)
        dispatcher = Dispatcher(calls.send)
        health = ReplicaHealth(poll, *health_times(model), table, on_silent=dispatcher.lose)
        dispatcher.on_loss, calls.poll = health.lose_request, health.poll_soon
        return ModelRoute(model, replicas, dispatcher, health, self._num_ingresses)


def health_times(model: ServedModel) -> tuple[float, float]:
    """Seconds between two polls of a model's replicas, and until one that does not answer counts as unhealthy."""
    return model.health_check_period_s, 2 * model.health_check_timeout_s
