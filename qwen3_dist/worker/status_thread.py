"""A thread of a rank that tells the engine what the main thread does, while a step is late."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback

from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.channel import Channel, ChannelClosedError
from qwen3_dist.protocol.messages import RankStatus
from qwen3_dist.worker.step_loop import Activity


class StatusThread:
    """Answers each StatusRequest that arrives at `channel`, until the engine closes the channel.

    Kernels and collectives release Python's lock, so a rank that is stuck in one answers; a process that is stopped
    does not.
    """

    def __init__(self, channel: Channel, activity: Activity) -> None:
        self._channel = channel
        self._activity = activity
        self._main = threading.current_thread().ident
        self.parallel: ParallelContext | None = None  # once the rank has joined its groups
        threading.Thread(target=self._answer, name="rank status", daemon=True).start()

    def _answer(self) -> None:
        with contextlib.suppress(ChannelClosedError):
            while True:
                self._channel.receive()
                self._channel.send(self._status())

    def _status(self) -> RankStatus:
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        progress = self.parallel.progress if self.parallel else (0, ())
        return RankStatus(self._activity.description, *progress, stack)
