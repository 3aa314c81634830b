"""Changes of what a model's replicas take up as they run, which admins ask for.

All replicas take it up first. Then what was deployed is changed, so that replicas that start later have it too; it
lasts until the next `deploy`, which brings back what its file says. If either fails, the replicas take up again what
they had.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.ray_private import broadcast, running_replicas
from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from serve_app.apis.shared.answer import Json
from serve_app.deployed import apply_configs
from serve_app.ingress.changes import configs_of, deployment_of
from serve_app.ingress.model_routes import ModelRoute, ModelRoutes
from serve_app.ingress.peers import Peers, values
from serve_app.ingress.reload import has_all
from serve_app.settings import INGRESS, REPLICA

T = TypeVar("T")
logger = logging.getLogger("qwen3_dist.changes")
_CHANGING, _LISTED = "changing", "listed"
_ANSWER_TIMEOUT_S = 5.0
_LOAD_TIMEOUT_S = 600.0
_LIST_TIMEOUT_S = 30.0  # for Serve to tell all ingresses
_POLL_S = 0.1
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between tries to reach Serve's controller


class Deployed(NamedTuple):
    """What is deployed of a model, in JSON form: LiveSettings of its replicas, and its ServedModel."""

    live: Json
    served: Json


# Has the replicas take up a change while it is entered, and changes the Deployed. Undoes both if its body fails.
Change = Callable[[Deployed], AbstractAsyncContextManager[T]]


class LiveChanges:
    """Changes that one ingress leads. A service has one at a time. Used on the process's event loop."""

    def __init__(self, routes: ModelRoutes, peers: Peers) -> None:
        self._routes, self._peers = routes, peers
        self._changing = False
        peers.offer(_CHANGING, lambda: self._changing)
        peers.offer(_LISTED, self._listed)

    async def lead(self, route: ModelRoute, change: Change[T]) -> T:
        """Has `change` tell the replicas and change what is deployed, and deploys that. Returns what `change` gives.
        Raises what it does, and RequestError: 409 while another change is led, or if the service is not deployed by
        config, 503 if Serve does not take the change.

        Goes on to its end if the client leaves: without the context of the request, since Serve would cancel what the
        request has called.
        """
        gateway = serve.get_replica_context().app_name
        leading = self._lead(gateway, route, change)
        self._task = asyncio.create_task(leading, context=contextvars.Context())
        return await asyncio.shield(self._task)

    async def _lead(self, gateway: str, route: ModelRoute, change: Change[T]) -> T:
        with self._alone():
            if any(values(await self._peers.ask(_CHANGING, timeout_s=_ANSWER_TIMEOUT_S))):
                raise _busy()
            deployed, _ = await asyncio.to_thread(_deployed, gateway, route)
            before = copy.deepcopy(deployed)
            async with change(deployed) as result:
                served = await self._deploy(gateway, route, before, deployed)
            await self._until_listed(route, served)
            return result

    async def _deploy(self, gateway: str, route: ModelRoute, before: Deployed, after: Deployed) -> Json:
        """As `_deploy_changes`, again while Serve's controller is lost, in whose place Ray starts another. Raises
        RequestError."""
        arguments = (gateway, route, before, after)
        try:
            for pause_s in _PAUSES_S:
                with suppress(RayActorError, GetTimeoutError):
                    return await asyncio.to_thread(_deploy_changes, *arguments)
                await asyncio.sleep(pause_s)
            return await asyncio.to_thread(_deploy_changes, *arguments)
        except QwenDistError:
            raise
        except Exception as error:
            if isinstance(error, GetTimeoutError):  # it may have taken the change all the same
                with suppress(Exception):
                    await asyncio.to_thread(_deploy_changes, gateway, route, after, before)
            logger.exception("Serve did not take a change of %r", route.model.name)
            raise RequestError(
                f"Ray Serve did not take the change, so the replicas go back to what they had: {error}",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
            ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._changing:
            raise _busy()
        self._changing = True  # before others are asked: of two ingresses at once, one sees the other
        try:
            yield
        finally:
            self._changing = False

    def _listed(self) -> dict[str, tuple[list[str], int, str]]:
        models = (route.model for route in self._routes)
        return {each.name: (list(each.adapters), each.asleep, each.weights) for each in models}

    async def _until_listed(self, route: ModelRoute, served: Json) -> None:
        """Waits until all ingresses that answer have what is `served`, and Serve has told the replicas: meanwhile
        those that it tells do not count as running."""
        model = route.model.name
        wanted = (list(served["adapters"]), served.get("asleep", 0), served.get("weights", ""))
        deadline = asyncio.get_running_loop().time() + _LIST_TIMEOUT_S
        while asyncio.get_running_loop().time() < deadline:
            others = values(await self._peers.ask(_LISTED, timeout_s=_ANSWER_TIMEOUT_S))
            are_listed = all(listed.get(model) == wanted for listed in (self._listed(), *others))
            if are_listed and await asyncio.to_thread(has_all, route.replicas):
                return
            await asyncio.sleep(_POLL_S)
        logger.warning("not all ingresses and replicas have the change of %r yet", model)


def _deployed(gateway: str, route: ModelRoute) -> tuple[Deployed, dict[str, Any]]:
    """What is deployed of the model, as part of the configs of all applications. Raises RequestError (409) if it is
    not deployed any more."""
    application = route.model.application
    configs = configs_of(gateway, application)
    models = deployment_of(configs[gateway], INGRESS)["user_config"]["models"]
    live = deployment_of(configs[application], REPLICA)["user_config"]
    served = next((model for model in models if model["name"] == route.model.name), None)
    if served is None:
        raise RequestError(f"{route.model.name!r} is no longer deployed", status=HTTPStatus.CONFLICT)
    return Deployed(live, served), configs


def _deploy_changes(gateway: str, route: ModelRoute, before: Deployed, after: Deployed) -> Json:
    """Deploys what differs between `before` and `after`, and leaves the rest as it is by now: a `deploy` may have
    changed it while replicas took up a change. Returns the ServedModel as it is then."""
    newest, configs = _deployed(gateway, route)
    for current, old, new in zip(newest, before, after, strict=True):
        current |= {name: value for name, value in new.items() if name not in old or old[name] != value}
    apply_configs(configs.values())
    return newest.served


async def tell(route: ModelRoute, param: str, method: str, *arguments: Any) -> list[Any]:
    """Has all replicas take something up by `method`, which answers with a text if it cannot. Returns the answers.
    Raises RequestError, which blames `param`, if a replica cannot, EngineDeadError if one is lost."""
    name = route.model.name
    if not running_replicas(route.replicas):
        raise EngineDeadError(f"no replica of {name!r} runs; ask again when one does")
    answers: list[Any] = await broadcast(route.replicas, method, *arguments, timeout_s=_LOAD_TIMEOUT_S)
    if problem := next((each for each in answers if isinstance(each, str) and each), ""):
        raise RequestError(problem, param=param)
    if any(isinstance(each, BaseException) for each in answers):
        raise EngineDeadError(f"a replica of {name!r} was lost or did not answer in time; ask again")
    return answers


@asynccontextmanager
async def told(
    route: ModelRoute, param: str, method: str, arguments: tuple[Any, ...], before: tuple[Any, ...]
) -> AsyncIterator[list[Any]]:
    """A context with what `tell` returns. If a replica cannot take it up, or the body fails, all are told by the
    arguments `before` to have what they had."""
    try:
        yield await tell(route, param, method, *arguments)
    except BaseException:
        try:
            await tell(route, param, method, *before)
        except Exception:
            logger.exception("a replica of %r may not be as it was before", route.model.name)
        raise


def _busy() -> RequestError:
    return RequestError("the service is being changed; ask again", status=HTTPStatus.CONFLICT)
