"""The rank's side of a move of experts: a thread reads those that come, and between two steps they take their places.

The engine's side is `expert_balance.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qwen3_dist.errors import CheckpointError
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.model.feed_forward import MoEFeedForward, PreparedMove
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.weights.loader import ExpertReader


class ExpertMoves:
    """Moves experts of one rank's model, a layer at a time. Its methods are called between steps and do not wait."""

    def __init__(self, model: Qwen3Model, path: Path, random: bool) -> None:
        """`path` is the checkpoint's directory; `random` weights need none."""
        self._model = model
        self._reader = ExpertReader(path, model, random)
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._reading: Reading | None = None
        self._last_ended = threading.Event()  # a reading may go on for a moment after it was dropped
        self._last_ended.set()

    def start(self, layer: int, placement: ExpertPlacement) -> None:
        """Begins to read what this rank needs to follow `placement`, in place of what was read before."""
        self.drop()
        moe = self._model.moe_layers.get(layer)
        if moe is not None:  # it is of this rank's stage
            device, stream = self._model.device, self._stream
            self._reading = Reading(self._reader, moe, layer, placement, device, stream, self._last_ended)
            self._last_ended = self._reading.ended
            self._reading.start()

    @property
    def arrived(self) -> bool:
        """Whether all is here. Raises CheckpointError if it cannot be read."""
        if self._reading is None:
            return True
        if self._reading.error is not None:
            raise self._reading.error
        return self._reading.prepared is not None

    @torch.inference_mode()
    def finish(self) -> None:
        """Puts the experts that have arrived in their places, and routes by their placement from the next step on."""
        reading, self._reading = self._reading, None
        if reading is not None:
            assert reading.prepared is not None, "the engine asks first whether all has arrived"
            reading.moe.move(reading.prepared)
            if self._stream is not None:
                for tensor in reading.prepared.tensors:  # until this step's stream has copied them
                    tensor.record_stream(torch.cuda.current_stream())

    def drop(self) -> None:
        """Forgets what was read, and ends the reading."""
        if self._reading is not None:
            self._reading.unwanted.set()
            self._reading = None


class _UnwantedError(Exception):
    """Nobody waits for what is being read."""


class Reader(Protocol):
    """An `ExpertReader`, or what stands in for one."""

    def read(
        self, layer: int, experts: Sequence[int], progress: Callable[[int], None]
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Reading(threading.Thread):
    """Reads what one move needs, to the device and in the form of the weights. Ends with the process."""

    def __init__(
        self,
        reader: Reader,
        moe: MoEFeedForward,
        layer: int,
        placement: ExpertPlacement,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        after: threading.Event,
    ) -> None:
        super().__init__(name=f"experts of layer {layer}", daemon=True)
        self.moe = moe
        self.prepared: PreparedMove | None = None
        self.error: CheckpointError | None = None
        self.unwanted = threading.Event()
        self.ended = threading.Event()
        self._reader = reader
        self._layer = layer
        self._placement = placement
        self._device = device
        self._stream = stream
        self._after = after

    def run(self) -> None:
        self._after.wait()
        try:
            with _beside_steps(self._stream), torch.inference_mode():
                prepared = self.prepare()
            self.prepared = prepared  # it is there as a whole
        except _UnwantedError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, experts stay where they are and steps go on
            self.error = CheckpointError(f"the experts of layer {self._layer} could not be moved: {error}")
        finally:
            self.ended.set()

    def prepare(self) -> PreparedMove:
        """Reads now, in the caller's thread."""
        experts = list(self.moe.arrivals(self._placement).values())
        stacks = self._reader.read(self._layer, experts, self._go_on)
        one, two, three = (
            stack if stack.device == self._device else on_device(stack, stack.dtype, self._device)
            for stack in stacks
        )
        return self.moe.prepare_move(self._placement, (one, two, three))

    def _go_on(self, elements: int) -> None:
        if self.unwanted.is_set():
            raise _UnwantedError


@contextlib.contextmanager
def _beside_steps(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Has a GPU copy on `stream`, beside the steps, and waits for it at the end."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
