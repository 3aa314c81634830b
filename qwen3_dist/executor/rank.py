"""A rank, from an empty process to a runner that answers plans; and the in-process form of it.

rank                                   engine
── Hello(host, rendezvous port) ────▶
◀──────── Start(rendezvous address, ranks on this host)
   join process groups, load weights
── Progress ... ────────────────────▶
── Loaded(blocks that fit) ─────────▶  the smallest decides
◀──────────────────── num_blocks
── Ready ───────────────────────────▶
◀──────────── plan, Call, plan, ...   (None: end)
── result, Answer, ... ─────────────▶  (results: from tp rank 0 of the last stage only)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine import kv_cache
from qwen3_dist.engine.placements import initial_placements
from qwen3_dist.engine.runner import ModelRunner
from qwen3_dist.engine.scheduler import SchedulerLimits
from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.executor.channel import Channel, connect
from qwen3_dist.garbage import exempt_present_objects
from qwen3_dist.model import Qwen3Model
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import DispatchOptions, uses_all_to_all
from qwen3_dist.settings import EngineConfig
from qwen3_dist.step_memory import step_bytes
from qwen3_dist.weights.adapters import load_adapters
from qwen3_dist.weights.loader import Progress, load_model
from qwen3_dist.weights.source import resolve_model

_PROGRESS_PERIOD_S = 0.1
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


@dataclass(frozen=True)
class RankSpec:
    """What a new process must be told to become a rank. `device` is "cpu" or "cuda"."""

    rank: int
    config: EngineConfig
    device: str
    address: tuple[str, int]
    secret: bytes


@dataclass(frozen=True)
class Hello:
    rank: int
    pid: int
    host: str
    host_id: str
    store_port: int | None  # rank 0's rendezvous store


@dataclass(frozen=True)
class Start:
    store_address: tuple[str, int]
    ranks_on_host: int
    local_rank: int


@dataclass(frozen=True)
class Loading:
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Loaded:
    num_blocks: int  # KV-cache blocks that fit beside the weights


@dataclass(frozen=True)
class Ready:
    """The cache is allocated; plans may come."""

    backends: str  # what runs this rank's steps


@dataclass(frozen=True)
class Call:
    """A method of the rank's runner to call between two steps."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    value: Any


@dataclass(frozen=True)
class Failed:
    """What a rank says before it ends; `error` is what went wrong on it."""

    rank: int
    error: QwenDistError
    details: str


def torch_dtype(config: EngineConfig, model_config: ModelConfig) -> torch.dtype:
    """The compute dtype that the settings ask for."""
    return getattr(torch, model_config.dtype if config.dtype == "auto" else config.dtype)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def set_threads(config: EngineConfig, ranks_on_host: int) -> None:
    """Has this process compute with as many threads as the settings say, or with its share of the cores.

    Said in any case: Ray hides all but one core from a worker's OpenMP.
    """
    share = max(1, cores() // ranks_on_host)
    torch.set_num_threads(config.threads_per_rank or share)


def load_shard(
    config: EngineConfig, parallel: ParallelContext, device: torch.device, progress: Progress | None
) -> Qwen3Model:
    """Finds the checkpoint on this host and loads this rank's part of it."""
    path = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_directory(path)
    dtype, random = torch_dtype(config, model_config), config.load_format == "random"
    placements = initial_placements(config, model_config)
    model = load_model(path, model_config, parallel, dtype, device, progress, random, placements)
    if config.quantize == "int8":
        model.quantize()
    model.pack()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what weights left behind when they were laid out anew is the KV cache's
    load_adapters(config.lora, model)
    return model


def count_blocks(config: EngineConfig, model: Qwen3Model, ranks_on_host: int) -> int:
    """KV-cache blocks this rank can hold beside its weights, from the settings or from free memory."""
    if config.num_blocks is not None:
        return config.num_blocks
    device = model.device
    if config.kv_cache_gib is not None and device.type == "cpu":
        free = int(config.kv_cache_gib * 2**30)
    else:
        free = kv_cache.free_bytes(device, config.gpu_memory_utilization, ranks_on_host)
    per_block = kv_cache.block_bytes(model, config.block_size)
    longest = min(config.max_model_len or model.config.context_length, model.config.context_length)
    limits = SchedulerLimits.of(config, device.type, num_blocks=free // per_block)
    most_useful = limits.max_num_seqs * -(-longest // config.block_size)
    if device.type == "cuda":  # of a CPU's memory caches take less than a third
        free -= _step_bytes(config, model, limits)
    return kv_cache.blocks_that_fit(free, per_block, most_useful)


def _step_bytes(config: EngineConfig, model: Qwen3Model, limits: SchedulerLimits) -> int:
    guesses = config.speculative.k if config.speculative is not None else 0
    draws = limits.max_num_seqs * (1 + guesses)
    tokens = max(limits.max_num_batched_tokens, draws)
    layout, widens = model.parallel.layout, config.quantize == "int8"
    by_all_to_all = uses_all_to_all(config, layout, model.config, tokens * layout.dp)
    return step_bytes(model.config, layout, tokens, draws, model.dtype.itemsize, by_all_to_all, widens)


def rank_main(spec: RankSpec) -> None:
    """Runs a rank until its engine says so or goes away. Failures are sent to the engine, not raised."""
    channel = connect(spec.address, spec.secret)
    try:
        _run(spec, channel)
    except EOFError:
        pass  # the engine is gone, so nobody needs this rank
    except Exception as error:
        known = (
            error if isinstance(error, QwenDistError) else EngineDeadError(f"{type(error).__name__}: {error}")
        )
        with contextlib.suppress(EOFError):
            channel.send(Failed(spec.rank, known, traceback.format_exc()))
    finally:
        channel.close()


def _run(spec: RankSpec, channel: Channel) -> None:
    parallel, ranks_on_host, device = _join(spec, channel)
    try:
        model = load_shard(spec.config, parallel, device, _report_to(channel))
        channel.send(Loaded(count_blocks(spec.config, model, ranks_on_host)))
        num_blocks = channel.receive()
        if num_blocks is None:
            return
        limits = SchedulerLimits.of(spec.config, device.type, num_blocks)
        runner = ModelRunner(model, num_blocks, spec.config, limits.max_num_seqs)
        exempt_present_objects()
        channel.send(Ready(runner.backends))
        while (message := channel.receive()) is not None:
            if isinstance(message, Call):
                channel.send(Answer(getattr(runner, message.method)(*message.arguments)))
            elif (result := runner.run(message)) is not None:
                channel.send(result)
    finally:
        parallel.close()


def _join(spec: RankSpec, channel: Channel) -> tuple[ParallelContext, int, torch.device]:
    """Meets the other ranks. Rank 0 hosts the rendezvous, on the address by which it reaches the engine."""
    host, world = channel.local_host, spec.config.layout.world
    timeout = timedelta(seconds=spec.config.start_timeout_s)
    store: dist.TCPStore | None = None
    if spec.rank == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
    channel.send(Hello(spec.rank, os.getpid(), host, socket.gethostname(), store.port if store else None))
    start = channel.receive()
    if store is None:
        master_host, master_port = start.store_address
        store = dist.TCPStore(master_host, master_port, world, is_master=False, timeout=timeout)
    set_threads(spec.config, start.ranks_on_host)
    device = torch.device("cpu")
    if spec.device == "cuda":
        device = torch.device("cuda", start.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    _use_interface_of(host)
    parallel = ParallelContext.connect(
        spec.config.layout,
        spec.rank,
        store,
        device,
        timeout_s=spec.config.step_timeout_s,
        staged=device.type == "cuda" and start.ranks_on_host > torch.cuda.device_count(),
        dispatch=DispatchOptions(spec.config.dispatch_dtype == "fp8", spec.config.overlap_dispatch_from),
    )
    return parallel, start.ranks_on_host, device


def _use_interface_of(host: str) -> None:
    """Makes gloo listen where the other hosts can reach it, rather than where the hostname points."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == host:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def _report_to(channel: Channel) -> Progress:
    """A loader callback that tells the engine now and then, and always at the end."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= _PROGRESS_PERIOD_S:
            last = now
            channel.send(Loading(done, total))

    return report
