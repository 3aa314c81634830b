"""A rank, from an empty process to a runner that answers plans (`messages.py` shows the conversation)."""

from __future__ import annotations

import contextlib
import time
import traceback

from qwen3_dist.engine.runner import ModelRunner
from qwen3_dist.engine.scheduler import SchedulerLimits
from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.executor.channel import Channel, connect
from qwen3_dist.executor.messages import Answer, Call, Failed, Loaded, Loading, RankSpec, Ready
from qwen3_dist.executor.rendezvous import join
from qwen3_dist.executor.shard import count_blocks, load_shard
from qwen3_dist.garbage import exempt_present_objects
from qwen3_dist.weights.loader import Progress
from qwen3_dist.weights.source import resolve_model

_PROGRESS_PERIOD_S = 0.1


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
    joined = join(spec, channel)
    try:
        path = resolve_model(spec.config.model, spec.config.revision)
        report = _report_to(channel)
        model = load_shard(spec.config, path, spec.placements, joined.parallel, joined.device, report)
        channel.send(Loaded(count_blocks(spec.config, model, joined.memory)))
        num_blocks = channel.receive()
        if num_blocks is None:
            return
        limits = SchedulerLimits.of(spec.config, joined.device.type, num_blocks)
        runner = ModelRunner(model, num_blocks, spec.config, limits.max_num_seqs, path)
        runner.warm_up()
        exempt_present_objects()
        channel.send(Ready(runner.backends, joined.parallel.collectives))
        while (message := channel.receive()) is not None:
            if isinstance(message, Call):
                channel.send(Answer(getattr(runner, message.method)(*message.arguments)))
            elif (result := runner.run(message)) is not None:
                channel.send(result)
    finally:
        joined.parallel.close()


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
