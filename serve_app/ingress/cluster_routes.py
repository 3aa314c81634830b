"""Routes that tell of the service: its models, its health, its replicas and their ranks."""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of the routes.
import asyncio
import time
from typing import Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from ray import serve

from qwen3_dist import __version__
from qwen3_dist.errors import EngineDeadError
from serve_app.apis.models import Model, Models
from serve_app.apis.openapi import route
from serve_app.ingress.adapter_changes import AdapterChanges, LoadLoraBody, UnloadLoraBody
from serve_app.ingress.admission import Admission
from serve_app.ingress.api import api
from serve_app.ingress.changes import ScaleBody, parse_scale, scale
from serve_app.ingress.cluster_view import IngressState, cluster_view
from serve_app.ingress.draining import Draining
from serve_app.ingress.http import is_anthropic, json_response, read_body
from serve_app.ingress.metrics import IngressMetrics
from serve_app.ingress.model_routes import ModelRoutes
from serve_app.ingress.peers import Peers
from serve_app.ingress.reload import Reload, ReloadBody, parse_reload
from serve_app.ingress.weight_changes import SleepBody, WakeBody, WeightChanges, WeightsBody
from serve_app.metrics.exposition import CONTENT_TYPE

METRICS = "/metrics"
REBALANCE = "/v1/cluster/experts/rebalance"
_MAX_ADMIN_BODY, _ADMIN_BODY_S = 2**16, 30.0  # bytes, seconds


class ClusterRoutes:
    """The part of the ingress that answers without running a model."""

    _routes: ModelRoutes
    _peers: Peers
    _draining: Draining
    _admission: Admission
    _reload: Reload
    _adapters: AdapterChanges
    _weights: WeightChanges
    metrics_of_http: IngressMetrics

    def __init__(self) -> None:
        self._created = int(time.time())

    def _num_ingresses(self) -> int:
        """The number of ingress replicas. Serve's proxies spread requests evenly over them."""
        return self._peers.count()

    def _max_in_flight(self) -> int:
        """Sequences that may be in flight or wait in all ingresses together."""
        return self._routes.max_in_flight()

    def _state(self) -> IngressState:
        """What `/v1/cluster` tells of this ingress."""
        uptime_s = time.time() - self._created
        in_flight, limit = self._admission.in_flight, self._admission.share()
        return IngressState(self._peers.me, in_flight, limit, uptime_s, self._reload.model)

    @api.get("/version", **route("vLLM: the version of this service"))
    async def version(self) -> Response:
        return json_response({"version": __version__})

    @api.get("/v1/models", **route("OpenAI, Anthropic: the models that are served"))
    @api.get("/v1/models/", include_in_schema=False)
    async def models(self, request: Request) -> Response:
        """The model list, in Anthropic's form if the request has its `anthropic-version` header."""
        models = await self._models()
        if is_anthropic(request):
            return json_response(models.anthropic_list(request.query_params))
        return json_response(models.openai_list())

    @api.get("/v1/models/{name:path}", **route("OpenAI, Anthropic: one model"))
    async def model(self, name: str, request: Request) -> Response:
        models = await self._models()
        form = models.anthropic_model if is_anthropic(request) else models.openai_model
        return json_response(form(name.removesuffix("/")))

    async def _models(self) -> Models:
        routes = list(self._routes)
        longest = await asyncio.gather(*(each.longest() for each in routes))
        return Models(
            tuple(
                Model(name, None if name == each.model.name else each.model.name, limit)
                for each, limit in zip(routes, longest, strict=True)
                for name in (each.model.name, *each.model.adapters)
            ),
            self._created,
        )

    @api.get("/health", **route("Whether this process lives and no engine is known to be lost"))
    async def health(self) -> Response:
        """200 unless every model had healthy replicas and has none now. Answers without asking replicas."""
        if all(each.state == "unhealthy" for each in self._routes):
            raise EngineDeadError("no replica is healthy")
        return json_response({"status": "ok"})

    @api.get("/ready", **route("Whether a request sent now would be answered"))
    async def ready(self, request: Request) -> Response:
        """The state of each model, or of the one that `?model=` names; 503 unless all are ready or asleep."""
        name = request.query_params.get("model", "")
        routes = [self._routes.find(name)] if name else list(self._routes)
        await asyncio.gather(*(each.health.known() for each in routes))  # this ingress may have just started
        self._draining.check()
        if waiting := [f"{each.model.name!r} is {each.state}" for each in routes if not each.answers]:
            raise EngineDeadError(f"not ready: {', '.join(waiting)}")
        states = {each.model.name: each.state for each in routes}
        return json_response({"status": "ready", "models": states})

    @api.get(METRICS, include_in_schema=False)
    async def metrics(self) -> Response:
        """For Prometheus: the metrics of all ingresses and of all replicas."""
        return Response(await self.metrics_of_http.page(), media_type=CONTENT_TYPE)

    @api.get("/v1/cluster/ranks", **route("Where ranks run and how they talk to each other"))
    async def ranks(self) -> Response:
        """Each replica's layout, backends, collectives and KV dtype, and the host, process and GPU of each rank."""
        return json_response({"object": "list", "data": await self._ask_all("ranks")})

    @api.get("/v1/cluster/experts", **route("The load of each expert"))
    async def experts(self) -> Response:
        """Each replica's expert load."""
        return json_response({"object": "list", "data": await self._ask_all("expert_load")})

    @api.post(REBALANCE, **route("Rebalances the placement of experts"))
    async def rebalance_experts(self) -> Response:
        """Has each replica rebalance its experts by their load. Answers with the layers that each replica changed."""
        return json_response({"object": "list", "data": await self._ask_all("rebalance_experts")})

    @api.post(
        "/v1/cluster/scale", **route("Changes the numbers of replicas of a model, or their layout", ScaleBody)
    )
    async def scale(self, request: Request) -> Response:
        """Until the next `deploy`, which brings back what its file says."""
        to = parse_scale(await _admin_body(request))
        found = self._routes.find(to.model)
        served = found.model
        if to.layout is not None:
            await found.check_layout(to.layout, to.replicas and to.replicas[0])
        gateway = serve.get_replica_context().app_name
        return json_response(await asyncio.to_thread(scale, gateway, served.application, served.name, to))

    @api.post("/v1/cluster/reload", **route("Loads a model again, replica by replica", ReloadBody))
    async def reload(self, request: Request) -> Response:
        """Each replica in turn leaves and is replaced; its requests go on elsewhere. Answers when this has begun."""
        name = parse_reload(await _admin_body(request))
        return json_response(await self._reload.begin(self._routes.find(name)))

    @api.post("/v1/cluster/weights", **route("Loads other weights into a running model", WeightsBody))
    async def weights(self, request: Request) -> Response:
        """Requests that run wait, and go on with the new weights. Answers when all replicas have them. Until the next
        `deploy`, which brings back what its file says."""
        return json_response(await self._weights.load(await _admin_body(request)))

    @api.post("/v1/cluster/sleep", **route("Puts a model to sleep: its memory is given up", SleepBody))
    async def sleep(self, request: Request) -> Response:
        """Requests that run wait until the model wakes, new ones are answered 503."""
        return json_response(await self._weights.sleep(await _admin_body(request)))

    @api.post("/v1/cluster/wake", **route("Wakes a model that was put to sleep", WakeBody))
    async def wake(self, request: Request) -> Response:
        return json_response(await self._weights.wake(await _admin_body(request)))

    @api.post("/v1/load_lora_adapter", **route("vLLM: loads a LoRA adapter", LoadLoraBody))
    async def load_lora_adapter(self, request: Request) -> Response:
        """Answers when all replicas have it. Until the next `deploy`, which brings back what its file says."""
        return PlainTextResponse(await self._adapters.load(await _admin_body(request)))

    @api.post("/v1/unload_lora_adapter", **route("vLLM: unloads a LoRA adapter", UnloadLoraBody))
    async def unload_lora_adapter(self, request: Request) -> Response:
        """Requests that use it end with it; new ones are answered 404."""
        return PlainTextResponse(await self._adapters.unload(await _admin_body(request)))

    async def _ask_all(self, method: str) -> list[Any]:
        """What the replicas of all models answer. Raises EngineDeadError if one is lost."""
        answers = await asyncio.gather(*(each.ask_all(method) for each in self._routes))
        return [answer for of_model in answers for answer in of_model]

    @api.get("/v1/cluster", **route("What runs: models, replicas, ranks, load"))
    async def cluster(self) -> Response:
        """The state of each model and replica, its ranks and its load. Counters begin at a replica's start."""
        return json_response(await cluster_view(self._routes, self._state(), self._peers))


async def _admin_body(request: Request) -> bytes:
    return await read_body(request, _MAX_ADMIN_BODY, _ADMIN_BODY_S)
