"""Loads and unloads LoRA adapters of a running model, by vLLM's routes.

All replicas load the adapters first. Then what was deployed is changed, so that replicas that start later have them
too; it lasts until the next `deploy`, which brings back what its file says.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, Any

from ray import serve

from cluster.ray_private import broadcast, running_replicas
from qwen3_dist.errors import ConfigError, EngineDeadError, RequestError
from qwen3_dist.lora_adapters import LoraAdapters
from serve_app.apis.models import model_not_found
from serve_app.apis.shared.body import Body, about, ignored, read_admin_body
from serve_app.deployed import apply_configs
from serve_app.ingress.changes import configs_of, deployment_of
from serve_app.ingress.model_routes import ModelRoute, ModelRoutes
from serve_app.ingress.peers import Peers, values
from serve_app.ingress.reload import has_all
from serve_app.settings import INGRESS, REPLICA

logger = logging.getLogger("qwen3_dist.adapters")
USE = "use_adapters"  # the method of replicas
_CHANGING, _LISTED = "changing_adapters", "adapters"
_ANSWER_TIMEOUT_S = 5.0
_LOAD_TIMEOUT_S = 600.0
_LIST_TIMEOUT_S = 30.0  # for Serve to tell all ingresses
_POLL_S = 0.1

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
    """Changes of adapters that one ingress leads. A service has one at a time. Used on the process's event loop."""

    def __init__(self, routes: ModelRoutes, peers: Peers) -> None:
        self._routes, self._peers = routes, peers
        self._changing = False
        peers.offer(_CHANGING, lambda: self._changing)
        peers.offer(_LISTED, self._listed)

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
        """Makes a change to its end, also if the client leaves. Without the context of the request, since Serve would
        cancel what the request has called."""
        gateway = serve.get_replica_context().app_name
        changing = self._change(gateway, route, change, again)
        self._task = asyncio.create_task(changing, context=contextvars.Context())
        await asyncio.shield(self._task)

    async def _change(
        self,
        gateway: str,
        route: ModelRoute,
        change: Callable[[LoraAdapters], LoraAdapters],
        again: Sequence[str],
    ) -> None:
        with self._alone():
            if any(values(await self._peers.ask(_CHANGING, timeout_s=_ANSWER_TIMEOUT_S))):
                raise _busy()
            application = route.model.application
            configs = await asyncio.to_thread(configs_of, gateway, application)
            settings = deployment_of(configs[application], REPLICA)["user_config"]
            before = LoraAdapters.parse(settings.get("lora", ""))
            to = change(before)
            try:
                await _tell(route, to, again)
            except BaseException:
                await _tell_back(route, before)
                raise
            settings["lora"] = str(to)
            for model in deployment_of(configs[gateway], INGRESS)["user_config"]["models"]:
                if model["name"] == route.model.name:
                    model["adapters"] = to.names
            await asyncio.to_thread(apply_configs, configs.values())
            await self._until_listed(route, to.names)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._changing:
            raise _busy()
        self._changing = True  # before others are asked: of two ingresses at once, one sees the other
        try:
            yield
        finally:
            self._changing = False

    def _listed(self) -> dict[str, list[str]]:
        return {route.model.name: list(route.model.adapters) for route in self._routes}

    async def _until_listed(self, route: ModelRoute, names: list[str]) -> None:
        """Waits until all ingresses that answer list the adapters, and Serve has told the replicas: meanwhile those
        that it tells do not count as running."""
        model = route.model.name
        deadline = asyncio.get_running_loop().time() + _LIST_TIMEOUT_S
        while asyncio.get_running_loop().time() < deadline:
            others = values(await self._peers.ask(_LISTED, timeout_s=_ANSWER_TIMEOUT_S))
            are_listed = all(listed.get(model) == names for listed in (self._listed(), *others))
            if are_listed and await asyncio.to_thread(has_all, route.replicas):
                return
            await asyncio.sleep(_POLL_S)
        logger.warning("not all ingresses and replicas have the adapters of %r yet", model)


async def _tell(route: ModelRoute, adapters: LoraAdapters, again: Sequence[str]) -> None:
    """Has all replicas load `adapters`. Raises RequestError if one cannot, EngineDeadError if one is lost."""
    name = route.model.name
    if not running_replicas(route.replicas):
        raise EngineDeadError(f"no replica of {name!r} runs; ask again when one does")
    answers: list[Any] = await broadcast(
        route.replicas, USE, str(adapters), tuple(again), timeout_s=_LOAD_TIMEOUT_S
    )
    if problem := next((each for each in answers if isinstance(each, str) and each), ""):
        raise RequestError(problem, param="lora_path")
    if any(isinstance(each, BaseException) for each in answers):
        raise EngineDeadError(f"a replica of {name!r} was lost or did not load the adapters; ask again")


async def _tell_back(route: ModelRoute, before: LoraAdapters) -> None:
    try:
        await _tell(route, before, ())
    except Exception:
        logger.exception("a replica of %r may have other adapters than before", route.model.name)


def _busy() -> RequestError:
    return RequestError("adapters are being changed; ask again", status=HTTPStatus.CONFLICT)


def _not_found(name: str, adapters: list[str]) -> RequestError:
    if adapters:
        return model_not_found(name, adapters)
    return RequestError("no LoRA adapter is loaded", param="lora_name", status=HTTPStatus.NOT_FOUND)
