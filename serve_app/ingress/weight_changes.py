"""Loads other weights into a running model, and puts it to sleep and wakes it, without new processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from qwen3_dist.errors import ConfigError, RequestError
from qwen3_dist.weights_version import WeightsVersion
from serve_app.apis.shared.answer import Json
from serve_app.apis.shared.body import Body, Range, about, read_admin_body
from serve_app.ingress.live_changes import Deployed, LiveChanges, told
from serve_app.ingress.model_routes import ModelRoute, ModelRoutes

USE, SLEEP = "use_weights", "sleep"  # the methods of replicas

_Model = Annotated[str, about("Name of the served model; optional if there is one.")]


class WeightsBody(Body):
    """A body of /v1/cluster/weights."""

    path: Annotated[
        str, about("Directory on each node, of weights of the same architecture in safetensors format.")
    ]
    version: Annotated[str, about("Name of the version; by default that of the directory.")] = ""
    keep_cache: Annotated[
        bool, about("Whether requests that run keep their KV, which the old weights computed.")
    ] = False
    model: _Model = ""


class SleepBody(Body):
    """A body of /v1/cluster/sleep."""

    level: Annotated[int, Range(1, 2), about("1 keeps the weights in host memory, 2 drops them.")] = 1
    model: _Model = ""


class WakeBody(Body):
    """A body of /v1/cluster/wake."""

    model: _Model = ""


class WeightChanges:
    """Changes of weights, and of sleep, that an ingress leads. Bodies are refused by RequestError; EngineDeadError
    tells that a replica was lost."""

    def __init__(self, routes: ModelRoutes, changes: LiveChanges) -> None:
        self._routes, self._changes = routes, changes

    async def load(self, body: bytes) -> Json:
        """Loads other weights, and answers when all replicas have them."""
        read = read_admin_body(WeightsBody, body)
        route = self._route(read.model)
        try:
            to = WeightsVersion.of(read.path, read.version)
        except ConfigError as error:
            raise RequestError(str(error), param="version" if read.version else "path") from None
        if not to.path:
            raise RequestError("path must name a directory", param="path")

        @asynccontextmanager
        async def change(deployed: Deployed) -> AsyncIterator[Json]:
            before = deployed.live.get("weights", "")
            arguments = (str(to), read.keep_cache, True)
            async with told(route, "path", USE, arguments, (before, False, False)) as loaded:
                deployed.live["weights"] = deployed.served["weights"] = str(to)
                yield {
                    "object": "cluster.weights",
                    "model": route.model.name,
                    "version": to.version,
                    "path": to.path,
                    "replicas": len(loaded),
                    "seconds": max(each["seconds"] for each in loaded),
                    "bytes": sum(each["bytes"] for each in loaded),
                }

        return await self._changes.lead(route, change)

    async def sleep(self, body: bytes) -> Json:
        """Puts a model to sleep: new requests are answered 503, those that run wait."""
        read = read_admin_body(SleepBody, body)
        return await self._to_level(self._route(read.model), "sleep", read.level)

    async def wake(self, body: bytes) -> Json:
        """Wakes a model; requests that waited go on."""
        return await self._to_level(self._route(read_admin_body(WakeBody, body).model), "wake", 0)

    async def _to_level(self, route: ModelRoute, verb: str, level: int) -> Json:
        return await self._changes.lead(route, partial(_change_level, route, verb, level))

    def _route(self, name: str) -> ModelRoute:
        route = self._routes.find(name)
        if route.model.name != name != "":
            raise RequestError(f"{name!r} is an adapter; name its model", param="model")
        return route


@asynccontextmanager
async def _change_level(route: ModelRoute, verb: str, level: int, deployed: Deployed) -> AsyncIterator[Json]:
    before: Any = deployed.live.get("asleep", 0)
    async with told(route, "model", SLEEP, (level,), (before,)):
        deployed.live["asleep"] = deployed.served["asleep"] = level
        yield {"object": f"cluster.{verb}", "model": route.model.name} | ({"level": level} if level else {})
