"""A thread of a rank that serves the engine while the main thread may be stuck in a step."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback

from qwen3_dist.errors import EngineDeadError
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.channel import Channel, ChannelClosedError
from qwen3_dist.protocol.messages import AbortCollectives, RankStatus
from qwen3_dist.worker.step_loop import Activity

_ABORT_S = 15.0


class StatusThread:
    """Answers each StatusRequest that arrives at `channel`, and ends collectives at each AbortCollectives, until the
    engine closes the channel.

    Kernels and collectives release Python's lock, so a rank that is stuck in one answers; a process that is stopped
    does not.
    """

    def __init__(self, channel: Channel, activity: Activity) -> None:
        self._channel = channel
        self._activity = activity
        self._main = threading.current_thread().ident
        # It counts, since the engine may try several times to make ranks meet.
        self._aborted = threading.Semaphore(0)
        self.parallel: ParallelContext | None = None  # once the rank has joined its groups
        threading.Thread(target=self._answer, name="rank status", daemon=True).start()

    def await_abort(self) -> None:
        """Waits until collectives were ended, once for each Rejoin; the main thread may then join new groups. Raises
        EngineDeadError if they do not end."""
        if not self._aborted.acquire(timeout=_ABORT_S):
            raise EngineDeadError(f"collectives did not end within {_ABORT_S:g} s after a rank was lost")

    def _answer(self) -> None:
        with contextlib.suppress(ChannelClosedError):
            while True:
                if isinstance(self._channel.receive(), AbortCollectives):
                    self._abort()
                    self._aborted.release()
                else:
                    self._channel.send(self._status())
        self._abort()  # the engine is gone: the main thread must come to its channel, and end

    def _abort(self) -> None:
        if self.parallel:
            self.parallel.abort()

    def _status(self) -> RankStatus:
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        progress = self.parallel.progress if self.parallel else (0, ())
        return RankStatus(self._activity.description, *progress, stack)
