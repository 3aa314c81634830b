"""Signals that end a command which has something to clean up."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def exit_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt; not those
    that are ignored, as nohup has SIGHUP. For the main thread."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
