"""A rank, from an empty process to its end (`messages.py` shows the conversation with the engine)."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from typing import NoReturn

import torch

from qwen3_dist.errors import EngineDeadError, QwenDistError, ResourceError
from qwen3_dist.gc_utils import freeze_gc_heap
from qwen3_dist.protocol.channel import Channel, ChannelClosedError, connect
from qwen3_dist.protocol.messages import Failed, Loaded, Loading, RankSpec, Ready
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.weights.loader import Progress
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.worker.rendezvous import Joined, join
from qwen3_dist.worker.runner import ModelRunner
from qwen3_dist.worker.shard import count_blocks, load_shard
from qwen3_dist.worker.step_loop import Doing, run_steps

_PROGRESS_PERIOD_S = 0.1
_HEARD_WITHIN_S = 5.0  # the engine ends all ranks when one has failed


def rank_main(spec: RankSpec) -> None:
    """Runs a rank until its engine says so or goes away. What goes wrong is sent to the engine.

    A rank that has failed, or lost its engine, ends with its process: the others may be in a collective that can no
    longer complete, and to leave NCCL's groups in order would wait for them. Raises OSError if the engine cannot be
    reached.
    """
    channel = connect(spec.address, spec.secret)
    doing = Doing()
    try:
        joined = join(spec, channel)
        _serve(spec, channel, joined, doing)
    except ChannelClosedError:
        _end_process(0)  # the engine is gone, so nobody needs this rank
    except Exception as error:
        with contextlib.suppress(ChannelClosedError):
            details = "" if isinstance(error, QwenDistError) else traceback.format_exc()
            channel.send(Failed(spec.rank, told(error, spec.rank, doing.what), details))
            channel.wait_until_closed(_HEARD_WITHIN_S)
        _end_process(1)
    joined.parallel.close()
    channel.close()


def told(error: Exception, rank: int, doing: str) -> QwenDistError:
    """What the engine is told of an error of `rank`, in one sentence."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in first_line.lower():
        return ResourceError(
            f"rank {rank} ran out of memory while {doing} ({first_line.rstrip('.')}); lower max_num_batched_tokens, "
            "max_num_seqs or gpu_memory_utilization, or use more ranks"
        )
    if not isinstance(error, QwenDistError):
        return EngineDeadError(f"rank {rank} failed while {doing}: {type(error).__name__}: {error}")
    if doing == Doing().what:  # of its host, which may differ from the others
        return type(error)(f"rank {rank} on {socket.gethostname()}: {error}")
    return error


def _serve(spec: RankSpec, channel: Channel, joined: Joined, doing: Doing) -> None:
    """Loads the model and runs what the engine asks for until it ends the rank."""
    doing.what = "loading weights"
    path = resolve_model(spec.config.model, spec.config.revision)
    report = _report_to(channel)
    model = load_shard(spec.config, path, spec.placements, joined.parallel, joined.device, report)
    channel.send(Loaded(count_blocks(spec.config, model, joined.memory)))
    num_blocks = channel.receive()
    if num_blocks is None:
        return
    doing.what = "allocating the KV cache and warming up"
    limits = SchedulerLimits.of(spec.config, joined.device.type, num_blocks)
    runner = ModelRunner(model, num_blocks, spec.config, limits.max_num_seqs, path)
    runner.warm_up()
    freeze_gc_heap()
    channel.send(Ready(runner.backends, joined.parallel.collectives, runner.may_repeat))
    run_steps(channel, runner, joined.device.type == "cuda", doing)
    runner.close()  # on a clean end, before the process groups are left


def _end_process(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
