"""A GPU for each rank: NCCL against gloo, all layouts, CUDA graphs with NCCL, dispatchers by size, and a service.

`--device cpu` runs it on two CPU ranks, with shared memory in place of NCCL.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.check import CheckSkipped, Figures, PlannedCheck, Setting, require
from benchmarks.gpu_check.faults import a_rank_fails, a_rank_is_replaced
from benchmarks.gpu_check.graphs import as_without_graphs
from benchmarks.gpu_check.models import A3B, running, shape_only, small_checkpoint, small_shape
from benchmarks.gpu_check.on_ranks import compare_collectives
from benchmarks.gpu_check.parity import parity
from qwen3_dist.benchmark import Workload, measure
from qwen3_dist.launch.processes import shared_nursery

_READY_WITHIN_S = 90.0


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    world = _world(setting)
    rows = (1, 64, 1024, 8192) if setting.on_gpu else (1, 64)
    yield PlannedCheck(
        f"collectives of {world} ranks", partial(compare_collectives, setting, world, rows), 20
    )
    wide = {"moe": f"dp={world},ep={world}"}
    layouts = [("dense", f"tp={world}"), ("moe", f"tp={world},ep={world}"), *wide.items()]
    piped = [("dense", f"tp={world // 2},pp=2")]
    with shared_nursery():
        yield PlannedCheck("what collectives go over", partial(_told, setting, world), 10)
        for kind, layout in layouts + piped:
            yield PlannedCheck(f"{kind}, {layout}, parity", partial(_parity, setting, kind, layout), 10)
        for kind, layout in layouts + piped if setting.on_gpu else layouts[:1]:
            run = partial(_graphs, setting, kind, layout)
            yield PlannedCheck(f"{kind}, {layout}, decodes as without graphs", run, 20)
        for _, layout in layouts[1:]:
            yield PlannedCheck(f"{layout}, ways to experts by size", partial(_ways, setting, layout), 25)
    fails = partial(a_rank_fails, setting, f"tp={world}", "out of memory")
    yield PlannedCheck("a rank runs out of memory", fails, 15)
    replaced = partial(a_rank_is_replaced, setting, f"tp={world}")
    yield PlannedCheck("a killed rank is replaced", replaced, 45)
    yield PlannedCheck("a service over all ranks", partial(_service, setting, world), 45)


def _world(setting: Setting) -> int:
    """Number of ranks of the layouts. Raises CheckSkipped if there is only one GPU."""
    if not setting.on_gpu:
        return 2
    cards = torch.cuda.device_count()
    if cards < 2:
        raise CheckSkipped("NCCL needs two GPUs or more, and there is one")
    return max(world for world in (2, 4, 8) if world <= cards)  # sizes that divide the small models


def _told(setting: Setting, world: int) -> Figures:
    with running(setting, small_checkpoint("dense", setting), f"tp={world}", num_blocks=64) as engine:
        told = engine.collectives
    _require_nccl(setting, told)
    return {"collectives": told}


def _require_nccl(setting: Setting, told: str) -> None:
    require(not setting.on_gpu or told.startswith("NCCL"), f"each rank has a GPU, but collectives use {told}")


def _parity(setting: Setting, kind: str, layout: str) -> Figures:
    return parity(setting, kind, layout, length=24 if setting.on_gpu else 6, dtype="float32")


def _graphs(setting: Setting, kind: str, layout: str) -> Figures:
    figures = as_without_graphs(setting, kind, layout, (1, 3, 8) if setting.on_gpu else (1, 3))
    used = "CUDA graphs on" in figures["backends"]
    require(used or not setting.on_gpu, f"no graphs were captured: {figures['backends']}", **figures)
    return figures


def _ways(setting: Setting, layout: str) -> Figures:
    """Milliseconds of a prefill step with all-gather and with all-to-all, and the number of tokens from which
    all-to-all is faster: the threshold of `qwen3_dist/parallel/expert_exchange.py`."""
    sizes = (64, 256, 512, 1024, 4096, 16384) if setting.on_gpu else (16, 128)
    shape = {**A3B, "num_hidden_layers": 4} if setting.on_gpu else small_shape("moe")
    path = shape_only("ways-to-experts", shape, setting)
    took: dict[int, dict[str, float]] = {size: {} for size in sizes}
    for way in ("all_gather", "all_to_all"):
        settings = {"load_format": "random", "moe_dispatch": way, "max_num_batched_tokens": sizes[-1]}
        limits = {"max_model_len": 512, "max_num_seqs": 256, "num_blocks": 2048, "prefix_caching": False}
        with running(setting, path, layout, **settings, **limits) as engine:
            for size in sizes:
                length = max(8, size // 128)
                work = Workload(size // length, length, 1)
                firsts = [measure(engine, work)["ttft_ms"]["p50"] for _ in range(4)]
                took[size][way] = min(firsts[1:])
    slower = [size for size in sizes if took[size]["all_to_all"] >= took[size]["all_gather"]]
    later = [size for size in sizes if not slower or size > slower[-1]]
    return {
        "all_to_all_from": later[0] if later else f"more than {sizes[-1]}",
        "ms": {str(size): took[size] for size in sizes},
    }


def _service(setting: Setting, world: int) -> Figures:
    """Starts a service with one replica over all ranks, sends a request, and shuts it down."""
    missing = [name for name in ("ray", "fastapi", "pydantic_core") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckSkipped(f"{' and '.join(missing)} not installed, which a service needs")
    command = [sys.executable, "-m", "serve_app", "serve", "--json", "--layout", f"tp={world},ep={world}"]
    command += ["--device", setting.device, "--port", str(_free_port()), "--dtype", "float32"]
    command += [] if setting.on_gpu else ["--num-blocks", "256"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    too_late = threading.Timer(_READY_WITHIN_S, process.kill)
    too_late.start()
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline() or "{}")
        require("url" in told, f"the service was not ready within {_READY_WITHIN_S:g} s; stderr says why")
        too_late.cancel()
        ready = time.monotonic()
        asked = {"model": told["model"], "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        answer = _asked(f"{told['url']}/completions", asked)
        answered = time.monotonic()
        [replica] = _asked(f"{told['url']}/cluster/ranks")["data"]
        _require_nccl(setting, replica["collectives"])
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
        require(code == 0, f"the service ended with code {code}")
        return {
            "ready_s": round(ready - started, 1),
            "answered_s": round(answered - ready, 2),
            "ended_s": round(time.monotonic() - answered, 1),
            "tokens": answer["usage"]["completion_tokens"],
            "collectives": replica["collectives"],
        }
    finally:
        too_late.cancel()
        process.kill()
        process.wait()


def _free_port() -> int:
    """A free port outside the ephemeral range."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _asked(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
