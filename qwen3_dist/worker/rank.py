"""The main function of a rank's process (`protocol/messages.py` shows its messages to and from the engine)."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from qwen3_dist.errors import EngineDeadError, QwenDistError, ResourceError
from qwen3_dist.gc_utils import collect_frozen_heap, freeze_gc_heap
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.protocol.card import Card
from qwen3_dist.protocol.channel import Channel, ChannelClosedError, connect
from qwen3_dist.protocol.messages import (
    Downloading,
    Failed,
    Loaded,
    Loading,
    Progress,
    RankSpec,
    Ready,
    Rejoin,
    StatusHello,
)
from qwen3_dist.weights.lora_loader import has_only, load_adapters
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.weights.version_files import directory_of
from qwen3_dist.worker.regroup import keeps_its_part, regroup
from qwen3_dist.worker.rendezvous import Joined, join
from qwen3_dist.worker.runner import ModelRunner
from qwen3_dist.worker.shard import count_blocks, held_bytes, load_shard
from qwen3_dist.worker.status_thread import StatusThread
from qwen3_dist.worker.step_loop import Activity, run_steps
from qwen3_dist.worker.weight_change import open_weights

_PROGRESS_PERIOD_S = 0.1
_END_WAIT_S = 5.0  # the engine ends all ranks within this time after one has failed


def rank_main(spec: RankSpec) -> None:
    """Runs a rank until the engine ends it or is gone. Errors are sent to the engine.

    After an error, or if the engine is gone, the process exits at once: other ranks may hang in a collective, and
    leaving NCCL's groups in order would wait for them. Raises OSError if the engine cannot be reached.
    """
    channel = connect(spec.address, spec.secret)
    rank = _Rank(spec, channel)
    try:
        status_channel = connect(spec.address, spec.secret)
        status_channel.send(StatusHello(spec.rank))
        rank.serve(StatusThread(status_channel, rank.activity))
    except ChannelClosedError:
        _end_process(0)  # the engine is gone
    except Exception as error:
        with contextlib.suppress(ChannelClosedError):
            channel.send(rank.failed(error))
            channel.wait_until_closed(_END_WAIT_S)
        _end_process(1)
    channel.close()


class _Rank:
    """A rank as the engine sees it. `spec` changes where the engine changes its layout or the rank's place in it."""

    def __init__(self, spec: RankSpec, channel: Channel) -> None:
        self.spec = spec
        self.activity = Activity()
        self._channel = channel
        self._card: Card | None = None  # as it was before this process took memory of it

    def failed(self, error: Exception) -> Failed:
        """The message that tells the engine of `error`, which is being handled."""
        rank, details = self.spec.rank, "" if isinstance(error, QwenDistError) else traceback.format_exc()
        return Failed(rank, describe_failure(error, rank, self.activity.description), details)

    def serve(self, status: StatusThread) -> None:
        """Loads the model, then runs plans and calls of the engine until it ends the rank. The model stays where
        another rank is lost and replaced, and as much of it as possible where the layout changes."""
        channel = self._channel
        joined = self._join(self.spec, status)
        model, config = None, self.spec.config
        path = resolve_model(config.model, config.revision, _downloads_to(channel))
        while True:
            status.parallel = joined.parallel
            self.spec = joined.spec
            if model is None:
                self.activity.description = "loading weights"
                report = _report_to(channel)
                config, placements = self.spec.config, self.spec.placements
                model = load_shard(config, path, placements, joined.parallel, joined.device, report)
                blocks = count_blocks(config, model, joined.memory)
            elif model.weights != self.spec.config.weights:  # it was lost or joined while they changed
                self.activity.description = "loading weights"
                config = self.spec.config
                open_weights(config.weights, model, config, path).load(_report_to(channel))
            if not has_only(model, self.spec.config.lora):  # it was lost or joined while they changed
                load_adapters(self.spec.config.lora, model)
            channel.send(Loaded(blocks))
            message = channel.receive()
            if isinstance(message, int):
                blocks = message
                message = self._run(model, blocks, path, joined)
            if message is None:
                joined.parallel.close()
                return
            self.activity.description = "joining again"
            status.await_abort()
            joined.parallel.close()  # ranks that still wait for this one in a step fail
            if joined.device.type == "cuda":
                torch.cuda.empty_cache()  # the KV cache, which counts as used memory and which other ranks may need
            again = self._join(self.spec.moved(message), status)
            if again.spec.is_placed_as(self.spec):
                joined.parallel.become(again.parallel)
                joined = replace(again, parallel=joined.parallel)
                for moe in model.moe_layers.values():
                    moe.reset_counts()  # as in the new rank
            elif keeps_its_part(model, again.parallel) and model.weights == again.spec.config.weights:
                self.activity.description = "loading experts"
                random, report = again.spec.config.has_random_weights, _report_to(channel)
                files = directory_of(model.weights, path)
                regroup(model, again.parallel, again.spec.placements, files, random, report)
                if not has_only(model, again.spec.config.lora):
                    load_adapters(again.spec.config.lora, model)
                joined = replace(again, parallel=model.parallel)
                blocks = count_blocks(again.spec.config, model, again.memory)
            else:
                joined, model = again, None
                collect_frozen_heap()  # frees the weights

    def _join(self, spec: RankSpec, status: StatusThread) -> Joined:
        """As `join`, again for each Rejoin that comes meanwhile, since a rank that was to join did not start."""
        while isinstance(joined := join(spec, self._channel, self._card), Rejoin):
            status.await_abort()
            spec = spec.moved(joined)
        self._card = joined.card
        return joined

    def _run(self, model: Qwen3Model, blocks: int, path: Path, joined: Joined) -> Rejoin | None:
        """Runs plans and calls with a KV cache of so many blocks, until the engine ends the rank (None) or has it join
        others."""
        self.activity.description = "allocating the KV cache and warming up"
        runner = ModelRunner(model, blocks, self.spec.config, path)
        runner.warm_up()
        freeze_gc_heap()
        held = held_bytes(joined.device)
        self._channel.send(Ready(runner.backends, joined.parallel.collectives, runner.may_repeat, held))
        message = self._run_steps(runner)
        runner.close(keeps_model=message is not None)
        return message

    def _run_steps(self, runner: ModelRunner) -> Rejoin | None:
        """As `run_steps`. If a step fails, as it does when another rank is lost, tells the engine and waits for
        Rejoin; without one this process ends."""
        channel = self._channel
        try:
            return run_steps(channel, runner, runner.model.device.type == "cuda", self.activity)
        except ChannelClosedError:
            raise
        except Exception as error:
            channel.send(self.failed(error))
            with contextlib.suppress(TimeoutError):
                while (message := channel.receive(_END_WAIT_S)) is not None:
                    if isinstance(message, Rejoin):
                        return message
            _end_process(1)


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


def _end_process(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _downloads_to(channel: Channel) -> Progress:
    """A progress callback for the hub that sends Downloading if there is more."""
    most = 0

    def report(done: int, total: int) -> None:
        nonlocal most
        if done > most:
            most = done
            with contextlib.suppress(ChannelClosedError):
                channel.send(Downloading())

    return report


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
