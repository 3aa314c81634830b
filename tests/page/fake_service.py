"""A service whose answers are scripts, behind the real page and the real gate for keys: what browser tests talk to."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import Request, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.routing import Mount

from qwen3_dist.errors import RequestError
from serve_app.ingress.http import Api, json_response, make_api
from tests.page.scripts import CALL, ERROR, SCRIPTS, SLOW, Part
from tests.serve_app.gate import access
from tests.serve_app.support import free_port, wait_for

Json = dict[str, Any]
KEY = "sesame"
LAYERS, EXPERTS = 48, 128


class FakeService:
    """What tests set (`key`, `cluster`) and read (`asked`, `polls`, `hung_up`)."""

    def __init__(self, prefix: str = "") -> None:
        self.key = ""
        self.cluster = "moe"  # or "dense", "unhealthy", "old": without the route
        self.period_s = 2  # between two readings of the cluster
        self.asked: list[Json] = []
        self.polls = 0
        self.hung_up = threading.Event()
        self.url = f"http://127.0.0.1:{free_port()}{prefix}"
        self._prefix = prefix

    @property
    def api(self) -> Api:
        api = make_api(lambda request: access(api_key=self.key).check(request))
        routes = {
            "/v1/models": self.models,
            "/v1/cluster": self.show_cluster,
            "/v1/cluster/experts": self.experts,
        }
        for path, answer in routes.items():
            api.add_route(path, answer)
        api.add_route("/v1/chat/completions", self.chat, methods=["POST"])
        return api

    @contextmanager
    def serving(self) -> Iterator[FakeService]:
        port = int(self.url.split(":")[2].split("/")[0])
        app = Starlette(routes=[Mount(self._prefix, self.api)])
        config = uvicorn.Config(app, port=port, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join()

    async def models(self, request: Request) -> Response:
        names = ("Qwen3-30B-A3B", "sailor")
        return json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        last = body["messages"][-1]
        text = last["content"] if last["role"] == "user" else "result"
        name = next((name for name in SCRIPTS if name in text), "plain")
        if name == "refuse":
            raise RequestError("temperature must be at most 2, not 9", param="temperature")
        return StreamingResponse(self._events(SCRIPTS[name]), media_type="text/event-stream")

    async def _events(self, script: list[Part]) -> AsyncIterator[bytes]:
        def event(value: Json) -> bytes:
            return f"data: {json.dumps(value)}\n\n".encode()

        number = 0
        try:
            yield b": a comment\n\n"
            for field, text in script:
                if field == CALL:
                    delta: Json = {"tool_calls": [text]}
                elif field == ERROR:
                    yield event({"error": {"message": text, "type": "server_error"}}) + b"data: [DONE]\n\n"
                    return
                elif field == SLOW:
                    await asyncio.sleep(float(text))
                    continue
                else:
                    delta = {field: text}
                number += 1
                yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                await asyncio.sleep(0)
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield event({"choices": [], "usage": {"completion_tokens": number}})
            if script is not SCRIPTS["hang up"]:
                yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.hung_up.set()
            raise

    async def show_cluster(self, request: Request) -> Response:
        if self.cluster == "old":
            raise HTTPException(404, "Not Found")
        self.polls += 1
        return json_response(cluster(self.polls, self.cluster, self.period_s))

    async def experts(self, request: Request) -> Response:
        loads = [] if self.cluster == "dense" else [expert_load(0), expert_load(1)]
        return json_response({"object": "list", "data": loads})


def cluster(poll: int, kind: str, period_s: int) -> Json:
    """What /v1/cluster tells at the `poll`-th reading, `period_s` seconds after the one before."""
    well = kind != "unhealthy"
    replicas = [_replica(poll, i, well or i == 0, period_s) for i in range(1 if kind == "dense" else 2)]
    model = {
        "id": "Qwen3-30B-A3B",
        "status": "ready" if well else "unhealthy",
        "message": "" if well else "replica k3fz lost rank 2 on node-b",
        "replicas_running": len(replicas),
        "min_replicas": 1,
        "max_replicas": 3,
        "replicas": replicas,
    }
    running = sum(replica["load"].get("num_requests_running", 0) for replica in replicas)
    return {
        "object": "cluster",
        "version": "0.1.0",
        "uptime_s": 8000.5 + period_s * poll,
        "models": [model],
        "ingress": {"replicas": [], "in_flight": running + 3, "limit": 1256},
    }


def _replica(poll: int, index: int, healthy: bool, period_s: int) -> Json:
    def busy(at: float) -> float:  # from 0 to 1
        return 0.5 + 0.28 * math.sin(at / 6 + index) + 0.14 * math.sin(at / 1.9) + 0.06 * math.sin(at * 1.7)

    generated = sum(int(period_s * 2600 * busy(at)) for at in range(poll))
    prompt = sum(int(period_s * 9000 * busy(at) ** 3) for at in range(poll))
    ranks = [
        {
            "rank": rank,
            "host": f"node-{'ab'[index]}",
            "pid": 4100 + 17 * rank,
            "card": {"name": "NVIDIA H200", "uuid": f"GPU-{index}{rank}f3c"},
            "memory_bytes": int((118.4 + 0.7 * rank) * 2**30),
        }
        for rank in range(4)
    ]
    load = {
        "num_requests_running": int(64 * busy(poll)),
        "num_requests_waiting": max(0, int(90 * (busy(poll) - 0.7))),
        "kv_cache_usage": round(0.2 + 0.6 * busy(poll - 1), 3),
        "prompt_tokens": prompt,
        "generation_tokens": generated,
        "num_preemptions": 0,
        "steps": 40 * poll,
        "step_age_s": 0.012,
    }
    return {
        "id": ("h8qw", "k3fz")[index],
        "healthy": healthy,
        "message": "" if healthy else "rank 2 on node-b ended: CUDA error",
        "layout": "tp=4,ep=4",
        "backends": "CUDA: FlashAttention, Triton experts",
        "collectives": "NCCL",
        "ranks": ranks,
        "load": load if healthy else {},
    }


def expert_load(index: int) -> Json:
    """Tokens by layer: loads differ more in later layers; expert 5 of layer 0 has 4,242 on each replica."""

    def tokens(layer: int, expert: int) -> int:
        if (layer, expert) == (0, 5):
            return 4242
        draw = random.Random(f"{layer} {expert} {index}")
        popular = random.Random(f"{layer} {expert}").gammavariate(4 - 2.5 * layer / LAYERS, 1)
        return int(300 * popular * draw.uniform(0.8, 1.2))

    layers = range(LAYERS)
    hosted = [list(range(first, first + EXPERTS // 4)) for first in range(0, EXPERTS, EXPERTS // 4)]
    return {
        "tokens": {str(layer): [tokens(layer, expert) for expert in range(EXPERTS)] for layer in layers},
        "hosted": {str(layer): hosted for layer in layers},
        "imbalance": {str(layer): 1.0 + layer / 200 for layer in layers},
    }
