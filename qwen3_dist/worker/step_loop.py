"""A rank's work after its start: it launches steps and answers calls in the order in which they come.

On a GPU the next step is launched before the last is waited for, so that the device always has work:

    engine    plan 1, plan 2 ▶        ◀ result 1, plan 3 ▶        ◀ result 2 ...
    rank      launch 1, launch 2, send result 1, launch 3, send result 2 ...
    device    ──── step 1 ────╂──── step 2 ────╂──── step 3 ────
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from qwen3_dist.protocol.channel import Channel
from qwen3_dist.protocol.messages import Answer, Call
from qwen3_dist.worker.runner import ModelRunner, StepOutput

_POLL_S = 5e-5  # between two looks at the device and the channel, of steps that take milliseconds


class Doing:
    """What a rank is at, for the error that may end it: "loading weights", "running step 7"."""

    def __init__(self) -> None:
        self.what = "starting"


def run_steps(channel: Channel, runner: ModelRunner, overlaps: bool, doing: Doing) -> None:
    """Runs plans and calls until the engine sends None. The engine bounds how many plans are under way.

    With `overlaps` a launch returns while its step runs, so a plan that has come is launched before any result is
    waited for. Without, a launched step has run. Raises ChannelClosedError if the engine is gone.
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
        if message is None:
            return
        if isinstance(message, Call):
            while launched:
                channel.send(launched.popleft().result())
            doing.what = f"running {message.method}"
            channel.send(Answer(_called(runner, message)))
            continue
        doing.what = f"running step {message.step}"
        output = runner.launch(message)
        if output is not None:
            launched.append(output)
            if not overlaps:
                channel.send(launched.popleft().result())


def _called(runner: ModelRunner, call: Call) -> Any:
    return getattr(runner, call.method)(*call.arguments)
