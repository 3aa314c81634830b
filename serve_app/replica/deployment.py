"""The Serve deployment of a replica: owns one engine and answers requests with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Any

import ray
from ray import serve

from cluster import ray_private
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.rank_pace import RankPace
from qwen3_dist.errors import EngineDeadError, ParallelLayoutError, QwenDistError, ResourceError
from qwen3_dist.gc_utils import freeze_gc_heap
from qwen3_dist.launch.ray_ranks import LEAST_CPUS, check_cpus, most_cpu_ranks
from qwen3_dist.layout import Layout, nearest_layout
from qwen3_dist.protocol.outputs import EngineStats
from qwen3_dist.settings_reader import read_settings
from qwen3_dist.text.tokenizer import read_generation_defaults
from serve_app.apis.requests import AnyRequest
from serve_app.apis.shared.answer import DIED, LEFT, Counted, Running
from serve_app.apis.shared.errors import error_status, to_json
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.resume import Resume
from serve_app.failures import log_internal_error
from serve_app.metrics.engine import EngineMetrics
from serve_app.metrics.ray_export import RayPush
from serve_app.metrics.values import Snapshot
from serve_app.replica.changes import ChangesAsItRuns
from serve_app.replica.description import describe_load, describe_ranks, describe_weights
from serve_app.replica.load import shares_of_targets
from serve_app.replica.record import RequestRecord
from serve_app.replica.request_handler import RequestHandler
from serve_app.replica.request_server import RequestServer
from serve_app.replica_status import ReplicaStatus
from serve_app.settings import LiveSettings, ReplicaSettings
from serve_app.telemetry.logs import configure_logs
from serve_app.telemetry.summary import LastPart
from serve_app.telemetry.traces import flush_traces, trace_to

logger = logging.getLogger("qwen3_dist.replica")

_LAST_ANSWERS_S = 2.0  # longest wait, after the engine died, until its requests are answered with that error
_RECOVERIES_TOLD = 10  # the last ones
_LEAVE_S = 10.0  # longest wait for the engine of a replica that leaves
_PACE_TIMEOUT_S = 0.5  # the ranks answer between two steps
_FLUSH_S = 0.1  # for gRPC's threads to send the last messages


class EngineReplica(ChangesAsItRuns):
    """One engine. Construction loads the model.

    While the ranks of the engine change, requests that it ran are answered 503, so that another replica goes on with
    them, and new ones wait. When the engine dies, the replica ends its own process: Serve replaces a dead process at
    once, but an unhealthy one only after three failed health checks. It does so too if it is told to leave, and on
    SIGTERM.
    """

    _leaves = False

    def __init__(self, settings: ReplicaSettings) -> None:
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._process = f"{context.deployment}#{self._name}"
        live = read_settings(LiveSettings, ray_private.user_config())
        configure_logs(live.telemetry, self._process)
        self._targets = live.targets
        self._num_answering = 0
        self._engine = AsyncEngine(
            replace(settings.engine, lora=live.lora, weights=live.weights),
            parts_per_s=settings.parts_per_s,
            on_death=self._die,
        )
        logger.info("the engine is ready on %s", self._engine.backends)
        logger.info("its collectives: %s", self._engine.collectives)
        defaults = read_generation_defaults(self._engine.model_path)
        thinking = settings.enable_thinking
        self._metrics = EngineMetrics(self._engine, settings.served_name, self._name, settings.metrics_prefix)
        self._push = RayPush(self._metrics.read)
        self._handler = RequestHandler(
            self._engine,
            settings.served_name,
            defaults,
            {} if thinking is None else {"enable_thinking": thinking},
            settings.tool_call_form,
            self._metrics.requests,
        )
        self._requests = RequestServer(ray.util.get_node_ip_address(), self.answer)
        self._pace: RankPace | None = None
        ray_private.on_sigterm(lambda: self._begin_to_leave("got SIGTERM"))
        freeze_gc_heap()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes up LiveSettings; Serve calls it after the start and for each change."""
        live = read_settings(LiveSettings, user_config)
        telemetry, self._targets = live.telemetry, live.targets
        configure_logs(telemetry, self._process)
        trace_to(telemetry.traces_url, self._process)
        self._handler.log_requests = telemetry.log_requests
        await self._take_up(live)

    async def answer(
        self,
        request: AnyRequest,
        request_id: str,
        trace: Mapping[str, str] | None = None,
        resume: Resume | None = None,
        tell: Callable[[Any], object] = lambda item: None,
        num_bytes: float = math.inf,
    ) -> AsyncGenerator[Any, None]:
        """Yields Running, then a pair of HTTP status and body in a `Counted`, which has its tokens; errors have none.

        For a stream that is accepted the body is empty, and its parts follow, each as `Counted`. Before the body of a
        generated answer in one piece come empty parts, which count its tokens. The last part, or the body, is a
        LastPart, with the summary of the request. `trace` has the headers of its trace. With `resume` the parts follow
        those that another replica sent; the token counts include these. `tell` gets further Running.

        Errors are answered, not raised: a bug with 500, logged under `request_id`, a dead engine with 503 wherever the
        stream is, so that another replica can go on with it. The body of that 503 is LEFT if this replica leaves, DIED
        if it ends.
        """
        record = RequestRecord(request_id, trace or {}, self._name, num_bytes, tell=tell)
        self._num_answering += 1
        try:
            async with aclosing(self._answer(request, record, resume)) as items:
                async for item in items:
                    yield item
        finally:
            self._num_answering -= 1
            record.close(request)

    async def _answer(
        self, request: AnyRequest, record: RequestRecord, resume: Resume | None
    ) -> AsyncGenerator[Any, None]:
        def part(item: bytes) -> bytes:
            return LastPart.of(item, record.summary()) if record.ended else item

        def counted(item: Any) -> Counted:
            usage = record.usage
            if usage is None:
                return Counted(item, 0)
            return Counted(item, usage.total, usage.prompt, usage.cached, record.sent, record.fingerprint)

        def failed(error: QwenDistError) -> tuple[int, bytes]:
            record.ended = record.failed = True
            if isinstance(error, EngineDeadError) and (self._leaves or self._engine.has_died):
                return HTTPStatus.SERVICE_UNAVAILABLE, LEFT if self._leaves else DIED
            return error_status(error), part(to_json(request.error_body(error)))

        try:
            if self._leaves:
                raise EngineDeadError("this replica leaves; send the request again")
            await self._engine.recovered()
            yield Running(self._name)  # whatever follows may be what kills this process
            if not isinstance(request, GenerationRequest):
                body = await self._handler.respond(request, record)
                record.ended = True
                yield counted((HTTPStatus.OK, part(body)))
                return
            if not request.stream:
                async with aclosing(self._handler.whole(request, record, resume)) as items:
                    async for item in items:
                        yield counted((HTTPStatus.OK, part(item)) if record.ended else item)
                return
            stream = self._handler.stream(request, record, resume)
            await anext(stream)  # empty: it is accepted
        except Exception as error:  # noqa: BLE001 - bugs are answered too
            known = (
                error
                if isinstance(error, QwenDistError)
                else log_internal_error(error, logger, record.request_id)
            )
            yield failed(known)
            return
        async with aclosing(stream):
            prompt_tokens = record.usage.prompt if record.usage else 0
            yield Counted((HTTPStatus.OK, b""), 0, prompt_tokens, model=record.fingerprint)
            try:
                async for item in stream:
                    yield counted(part(item))
            except EngineDeadError as error:
                yield failed(error)

    async def stats(self) -> EngineStats:
        """The engine's current load and counters."""
        return self._engine.stats()

    async def metrics(self) -> Snapshot:
        """All metrics of this replica."""
        return await self._metrics.read()

    async def ranks(self) -> dict[str, Any]:
        """The layout, backends, collectives and KV cache's dtype of the engine, and its ranks."""
        return describe_ranks(self._engine)

    async def describe(self) -> dict[str, Any]:
        """This replica's part of `/v1/cluster`: whether its steps go on, its ranks and the slowest of them, its load
        and its counters."""
        problem, absence = self._problem(), self._engine.absence
        await self._read_pace()
        view, pace = describe_ranks(self._engine), self._pace
        if pace and len(pace.step_s) == len(view["ranks"]):  # else ranks have left or come back since
            for rank, step_s in zip(view["ranks"], pace.step_s, strict=True):
                rank["own_step_s"] = step_s
        return {
            "id": serve.get_replica_context().replica_id.unique_id,
            "healthy": not problem,
            "message": problem or self._live_problem or str(absence or ""),
            **view,
            "adapters": self._engine.config.lora.names,
            **describe_weights(self._engine),
            "absence": asdict(absence) if absence else None,
            "recoveries": [asdict(each) for each in self._engine.recoveries[-_RECOVERIES_TOLD:]],
            "slowest_rank": {"rank": pace.slowest, "excess": pace.excess} if pace else None,
            "load": describe_load(self._engine),
        }

    async def _read_pace(self) -> None:
        """Asks the ranks for their pace. If a step is long, or the engine has died, the last one stays."""
        if self._engine.config.layout.world > 1:
            with contextlib.suppress(TimeoutError, QwenDistError):
                self._pace = await asyncio.wait_for(self._engine.rank_pace(), _PACE_TIMEOUT_S)

    async def status(self) -> ReplicaStatus:
        """What ingresses poll. This replica is not healthy if it has lost a rank, or if a step takes far longer than
        those before it."""
        address = await self._requests.start()
        stats = self._engine.stats()
        return ReplicaStatus(
            self._problem(),
            self._engine.load().queued_tokens,
            stats.num_running + stats.num_waiting,
            self._name,
            ray.get_runtime_context().get_actor_id() or "",
            str(self._engine.absence or ""),
            address,
        )

    def _problem(self) -> str:
        try:
            self._engine.check_health()
        except EngineDeadError as error:
            return f"ranks change: {error}" if self._engine.recovers else str(error)
        return self._engine.stalled()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load for Serve's scaling (`serve_app/scaling.py`)."""
        return shares_of_targets(self._targets, self._engine, self._metrics.requests)

    async def expert_load(self) -> dict[str, Any]:
        """Tokens routed to each expert of each MoE layer so far, and the placement of the experts."""
        return (await self._engine.expert_load()).to_json()

    async def rebalance_experts(self) -> list[int]:
        """Rebalances experts by the load since the last rebalancing. Returns the layers that changed."""
        return await self._engine.rebalance_experts()

    async def check_layout(self, layout: str, replicas: int = 1) -> str:
        """Why `replicas` of the model cannot have `layout`, and the nearest that they can have; "" if they can."""
        return await asyncio.to_thread(self._layout_problem, layout, replicas)  # it asks Ray

    def _layout_problem(self, layout: str, replicas: int) -> str:
        config, engine = self._engine.model_config, self._engine.config
        on_cpus = engine.device == "cpu" and (engine.cpus_per_rank or 1.0) >= LEAST_CPUS
        most = max(1, most_cpu_ranks() // replicas) if on_cpus else None
        try:
            wanted = Layout.parse(layout)
            wanted.validate(config)
            if on_cpus:
                check_cpus(wanted, replicas)
        except (ParallelLayoutError, ResourceError) as error:
            return f"{error}; layout={nearest_layout(config, layout, most)} is the nearest that fits"
        return ""

    async def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._engine.max_model_len

    async def check_health(self) -> None:
        """Raises EngineDeadError once a rank is lost for good; Serve then replaces this replica."""
        if self._engine.has_died:
            self._engine.check_health()

    async def leave(self, replica: str) -> bool:
        """Has this replica end if it is called `replica`; returns whether it is. Its requests go on elsewhere."""
        if replica == self._name and not self._leaves:
            self._begin_to_leave("was told to leave")
        return replica == self._name

    def _begin_to_leave(self, reason: str) -> None:
        self._leaves = True
        logger.warning("this replica %s; Serve starts another", reason)
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        ending = threading.Thread(target=self._engine.shutdown, daemon=True)
        ending.start()
        ending.join(_LEAVE_S)
        self._exit_process()

    def _die(self) -> None:
        logger.error("the engine died; this replica exits and Serve starts another")
        self._exit_process()

    def _exit_process(self) -> None:
        """Ends this process after the requests that failed with the engine have been answered."""
        deadline = time.monotonic() + _LAST_ANSWERS_S
        while self._num_answering and time.monotonic() < deadline:
            time.sleep(_FLUSH_S)
        flush_traces()
        time.sleep(_FLUSH_S)
        os._exit(1)

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this before it ends the process, and awaits what it returns: the end of the requests in flight,
        of which it knows nothing. After `graceful_shutdown_timeout_s` it does not wait any longer."""
        self._leaves = True
        if self.__dict__.get("_num_answering"):
            return self._drain()
        engine = self.__dict__.get("_engine")  # absent if construction failed
        if engine:
            engine.shutdown()
        return None

    async def _drain(self) -> None:
        """Ends the engine after the requests in flight."""
        while self._num_answering:
            await asyncio.sleep(_FLUSH_S)
        await asyncio.to_thread(self._engine.shutdown)
