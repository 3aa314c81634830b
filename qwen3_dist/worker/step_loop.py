"""The main loop of a rank: launches steps and answers calls in the order in which they arrive.

On a GPU the next step is launched before the result of the last one is awaited, so the device always has work:

    engine    plan 1, plan 2 ▶        ◀ result 1, plan 3 ▶        ◀ result 2 ...
    rank      launch 1, launch 2, send result 1, launch 3, send result 2 ...
    device    ──── step 1 ────╂──── step 2 ────╂──── step 3 ────
"""

from __future__ import annotations

import time
from collections import deque

from qwen3_dist.protocol.channel import Channel
from qwen3_dist.protocol.messages import Answer, Call, Rejoin
from qwen3_dist.worker.runner import ModelRunner, StepOutput

_POLL_S = 5e-5  # between two polls of the device and the channel; steps take milliseconds


class Activity:
    """What a rank is doing, for error messages: "loading weights", "running step 7"."""

    def __init__(self) -> None:
        self.description = "starting"


def run_steps(channel: Channel, runner: ModelRunner, overlaps: bool, activity: Activity) -> Rejoin | None:
    """Runs plans and calls until the engine sends Rejoin or None, which is returned. The engine limits the number of
    plans in flight.

    `overlaps` (GPUs): a launch returns while its step runs, so the next plan is launched before results are awaited.
    Otherwise a step is finished when its launch returns. Raises ChannelClosedError if the engine is gone.
    """
    launched: deque[StepOutput] = deque()
    while True:
        if launched and not channel.readable():
            if launched[0].ready():
                channel.send(launched.popleft().result())
            else:
                time.sleep(_POLL_S)
            continue
        message = channel.receive()
        if message is None or isinstance(message, Rejoin):
            return message
        if isinstance(message, Call):
            while launched:
                channel.send(launched.popleft().result())
            activity.description = f"running {message.method}"
            channel.send(Answer(getattr(runner, message.method)(*message.arguments)))
            continue
        activity.description = f"running step {message.step}"
        began_s = time.perf_counter()
        output = runner.launch(message)
        runner.own_time.add(time.perf_counter() - began_s)
        if output is not None:
            launched.append(output)
            if not overlaps:
                channel.send(launched.popleft().result())
