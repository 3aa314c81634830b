"""Work that a rank does in a thread while steps go on, and of which the engine asks whether it is done."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from qwen3_dist.errors import CheckpointError, QwenDistError, ResourceError

T = TypeVar("T")


class Background(threading.Thread, Generic[T]):
    """Runs `work` on `stream`, in inference mode. Its `result`, or an `error` that says that `what` could not be done,
    is set at the end. Nothing of work that failed is kept."""

    def __init__(self, what: str, work: Callable[[], T], stream: torch.cuda.Stream | None) -> None:
        super().__init__(name=what, daemon=True)
        self.result: T | None = None
        self.error: QwenDistError | None = None
        self._what, self._work, self._stream = what, work, stream

    def run(self) -> None:
        try:
            with on_stream(self._stream), torch.inference_mode():
                result = self._work()
            self.result = result  # the steps' thread polls this, so it is set when complete
        except QwenDistError as error:
            _free_locals(error)
            self.error = error
        except Exception as error:  # noqa: BLE001 - after any error the engine decides how to go on
            kind = ResourceError if "memory" in str(error).lower() else CheckpointError
            self.error = kind(f"{self._what} could not be loaded: {error}")
        finally:
            del self._work

    @property
    def arrived(self) -> bool | QwenDistError:
        """Whether the work is done; the error if it failed."""
        return self.error or self.result is not None


def _free_locals(error: BaseException | None) -> None:
    """Empties the frames that an error holds: it is kept longer than they should be."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Makes this thread's copies to the GPU run on `stream`, concurrently with steps, and waits for them at the end.
    None: no GPU."""
    if stream is None:
        yield
        return
    torch.cuda.set_device(stream.device)  # else the thread goes back to card 0, whose memory that takes
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
