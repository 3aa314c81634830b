"""Loads and unloads LoRA adapters of a running model, by vLLM's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated

from qwen3_dist.errors import ConfigError, RequestError
from qwen3_dist.lora_adapters import LoraAdapters
from serve_app.apis.models import model_not_found
from serve_app.apis.shared.body import Body, about, ignored, read_admin_body
from serve_app.ingress.live_changes import Deployed, LiveChanges, told
from serve_app.ingress.model_routes import ModelRoute, ModelRoutes

USE = "use_adapters"  # the method of replicas

_Name = Annotated[str, about("Name by which requests choose the adapter.")]


class LoadLoraBody(Body):
    """A body of /v1/load_lora_adapter."""

    lora_name: _Name
    lora_path: Annotated[str, about("Directory on each node, or hub id, of an adapter in PEFT's format.")]
    load_inplace: Annotated[bool, about("Whether an adapter of this name may be there; it is replaced.")] = (
        False
    )
    model: Annotated[str, about("Name of the served model; optional if there is one.")] = ""


class UnloadLoraBody(Body):
    """A body of /v1/unload_lora_adapter."""

    lora_name: _Name
    lora_int_id: Annotated[int | None, ignored("the name says which adapter.")] = None


class AdapterChanges:
    """Changes of adapters that an ingress leads."""

    def __init__(self, routes: ModelRoutes, changes: LiveChanges) -> None:
        self._routes, self._changes = routes, changes

    async def load(self, body: bytes) -> str:
        """Loads an adapter, and returns what to tell the client. Raises RequestError or EngineDeadError."""
        read = read_admin_body(LoadLoraBody, body)
        route, name = self._routes.find(read.model), read.lora_name
        if route.model.name != read.model != "":
            raise RequestError(f"{read.model!r} is an adapter; name its model", param="model")

        def added(before: LoraAdapters) -> LoraAdapters:
            is_there = name in before.names
            if name in self._routes and not is_there:
                raise RequestError(
                    f"{name!r} is the name of a model or of its adapter; choose another", param="lora_name"
                )
            if is_there and not read.load_inplace:
                raise RequestError(
                    f"an adapter {name!r} is loaded already; unload it, or replace it with load_inplace",
                    param="lora_name",
                )
            pairs = dict(before.pairs) | {name: read.lora_path}
            try:
                return LoraAdapters(tuple(pairs.items()))
            except ConfigError as error:
                raise RequestError(str(error), param="lora_name") from None

        await self._lead(route, added, again=[name])
        return f"Success: the LoRA adapter {name!r} was added."

    async def unload(self, body: bytes) -> str:
        """Unloads an adapter, and returns what to tell the client. Raises RequestError (404 if there is none)."""
        name = read_admin_body(UnloadLoraBody, body).lora_name
        adapters = [each for route in self._routes for each in route.model.adapters]
        if name not in adapters:
            raise _not_found(name, adapters)

        def without(before: LoraAdapters) -> LoraAdapters:
            if name not in before.names:
                raise _not_found(name, before.names)
            return LoraAdapters(tuple(pair for pair in before.pairs if pair[0] != name))

        await self._lead(self._routes.find(name), without)
        return f"Success: the LoRA adapter {name!r} was removed."

    async def _lead(
        self, route: ModelRoute, change: Callable[[LoraAdapters], LoraAdapters], again: Sequence[str] = ()
    ) -> None:
        @asynccontextmanager
        async def use(deployed: Deployed) -> AsyncIterator[None]:
            route.require_awake()  # else it would wait until the model wakes
            before = LoraAdapters.parse(deployed.live.get("lora", ""))
            to = change(before)
            async with told(route, "lora_path", USE, (str(to), tuple(again)), (str(before), ())):
                deployed.live["lora"] = str(to)
                deployed.served["adapters"] = to.names
                yield

        await self._changes.lead(route, use)


def _not_found(name: str, adapters: list[str]) -> RequestError:
    if adapters:
        return model_not_found(name, adapters)
    return RequestError("no LoRA adapter is loaded", param="lora_name", status=HTTPStatus.NOT_FOUND)
