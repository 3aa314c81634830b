"""The main function of a rank's process (`protocol/messages.py` shows its messages to and from the engine)."""

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
from qwen3_dist.protocol.messages import (
    Failed,
    Loaded,
    Loading,
    Progress,
    RankSpec,
    Ready,
    Rejoin,
    StatusHello,
)
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.worker.rendezvous import Joined, join
from qwen3_dist.worker.runner import ModelRunner
from qwen3_dist.worker.shard import count_blocks, held_bytes, load_shard
from qwen3_dist.worker.status_thread import StatusThread
from qwen3_dist.worker.step_loop import Activity, run_steps

_PROGRESS_PERIOD_S = 0.1
_END_WAIT_S = 5.0  # the engine ends all ranks within this time after one has failed


def rank_main(spec: RankSpec) -> None:
    """Runs a rank until the engine ends it or is gone. Errors are sent to the engine.

    After an error, or if the engine is gone, the process exits at once: other ranks may hang in a collective, and
    leaving NCCL's groups in order would wait for them. Raises OSError if the engine cannot be reached.
    """
    channel = connect(spec.address, spec.secret)
    activity = Activity()
    try:
        status_channel = connect(spec.address, spec.secret)
        status_channel.send(StatusHello(spec.rank))
        status = StatusThread(status_channel, activity)
        joined = join(spec, channel)
        status.parallel = joined.parallel
        _serve(spec, channel, joined, status, activity)
    except ChannelClosedError:
        _end_process(0)  # the engine is gone
    except Exception as error:
        with contextlib.suppress(ChannelClosedError):
            channel.send(_failed(spec, error, activity))
            channel.wait_until_closed(_END_WAIT_S)
        _end_process(1)
    joined.parallel.close()
    channel.close()


def _failed(spec: RankSpec, error: Exception, activity: Activity) -> Failed:
    """The message that tells the engine of `error`, which is being handled."""
    details = "" if isinstance(error, QwenDistError) else traceback.format_exc()
    return Failed(spec.rank, describe_failure(error, spec.rank, activity.description), details)


def describe_failure(error: Exception, rank: int, activity: str) -> QwenDistError:
    """The error that the engine reports for `error` of `rank`, one sentence. `activity` is what the rank was doing."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in first_line.lower():
        return ResourceError(
            f"rank {rank} ran out of memory while {activity} ({first_line.rstrip('.')}); lower "
            "max_num_batched_tokens, max_num_seqs or gpu_memory_utilization, or use more ranks"
        )
    if not isinstance(error, QwenDistError):
        return EngineDeadError(f"rank {rank} failed while {activity}: {type(error).__name__}: {error}")
    if activity == Activity().description:  # the error may concern this host only
        return type(error)(f"rank {rank} on {socket.gethostname()}: {error}")
    return error


def _serve(
    spec: RankSpec, channel: Channel, joined: Joined, status: StatusThread, activity: Activity
) -> None:
    """Loads the model, then runs plans and calls of the engine until it ends the rank. The model stays where another
    rank is lost and replaced."""
    activity.description = "loading weights"
    path = resolve_model(spec.config.model, spec.config.revision)
    report = _report_to(channel)
    model = load_shard(spec.config, path, spec.placements, joined.parallel, joined.device, report)
    blocks = count_blocks(spec.config, model, joined.memory)
    while True:
        channel.send(Loaded(blocks))
        blocks = channel.receive()
        if blocks is None:
            return
        activity.description = "allocating the KV cache and warming up"
        runner = ModelRunner(model, blocks, spec.config, path)
        runner.warm_up()
        freeze_gc_heap()
        held = held_bytes(joined.device)
        channel.send(Ready(runner.backends, joined.parallel.collectives, runner.may_repeat, held))
        again = _run_steps(spec, channel, runner, activity)
        runner.close()
        del runner  # frees the KV cache
        if again is None:
            return
        activity.description = "joining again"
        status.await_abort()
        joined.parallel.close()  # ranks that still wait for this one in a step fail
        joined.parallel.become(join(spec, channel).parallel)
        for moe in model.moe_layers.values():
            moe.reset_counts()  # as in the new rank


def _run_steps(spec: RankSpec, channel: Channel, runner: ModelRunner, activity: Activity) -> Rejoin | None:
    """As `run_steps`. If a step fails, as it does when another rank is lost, tells the engine and waits for Rejoin;
    without one this process ends."""
    try:
        return run_steps(channel, runner, runner.model.device.type == "cuda", activity)
    except ChannelClosedError:
        raise
    except Exception as error:
        channel.send(_failed(spec, error, activity))
        with contextlib.suppress(TimeoutError):
            while (message := channel.receive(_END_WAIT_S)) is not None:
                if isinstance(message, Rejoin):
                    return message
        _end_process(1)


def _end_process(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_to(channel: Channel) -> Progress:
    """A progress callback for the loader that sends Loading at most every _PROGRESS_PERIOD_S, and at the end."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= _PROGRESS_PERIOD_S:
            last = now
            channel.send(Loading(done, total))

    return report
