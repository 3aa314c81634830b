"""The rank's side of expert rebalancing. A thread reads the weights of new experts while steps go on; between two
steps they replace the experts that leave. The engine's side is `engine/expert_balance.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qwen3_dist.errors import CheckpointError
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.model.expert_lora import ExpertLowRank
from qwen3_dist.model.feed_forward import MoEFeedForward, PreparedMove
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.weights.expert_lora_loader import read_expert_adapters
from qwen3_dist.weights.loader import ExpertReader
from qwen3_dist.worker.background import on_stream


class ExpertMoves:
    """Replaces experts of one rank's model, one layer at a time. Methods are called between steps and never wait."""

    def __init__(self, model: Qwen3Model, path: Path, random: bool) -> None:
        """`path` is the directory of the checkpoint; it is not read if weights are `random`."""
        self._model = model
        self._reader = ExpertReader(path, model, random)
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._thread: ExpertReadThread | None = None
        self._last_ended = threading.Event()  # of the last thread, which may run on after `drop`
        self._last_ended.set()

    def start(self, layer: int, placement: ExpertPlacement) -> None:
        """Starts to read the experts that this rank needs for `placement`. Drops what an earlier call has read."""
        self.drop()
        moe = self._model.moe_layers.get(layer)
        if moe is not None:  # the layer is in this rank's pipeline stage
            device, stream = self._model.device, self._stream
            reader = _WithAdapters(self._reader, self._model)
            self._thread = ExpertReadThread(reader, moe, layer, placement, device, stream, self._last_ended)
            self._last_ended = self._thread.ended
            self._thread.start()

    @property
    def arrived(self) -> bool:
        """Whether all experts have been read. Raises CheckpointError if they cannot be read."""
        if self._thread is None:
            return True
        if self._thread.error is not None:
            raise self._thread.error
        return self._thread.prepared is not None

    @torch.inference_mode()
    def finish(self) -> None:
        """Replaces experts by those that were read, and routes by the new placement from the next step on."""
        thread, self._thread = self._thread, None
        if thread is not None:
            assert thread.prepared is not None, "the engine asks first whether all experts have been read"
            thread.moe.move(thread.prepared)
            if self._stream is not None:
                for (
                    tensor
                ) in thread.prepared.tensors:  # keeps their memory until the steps' stream has copied them
                    tensor.record_stream(torch.cuda.current_stream())

    def drop(self) -> None:
        """Stops reading and drops what was read."""
        if self._thread is not None:
            self._thread.dropped.set()
            self._thread = None


class _DroppedError(Exception):
    """Ends a thread whose experts are no longer needed."""


class Reader(Protocol):
    """The interface of `weights.loader.ExpertReader`, and the adapters of the experts of a rank."""

    def read(
        self, layer: int, experts: Sequence[int], progress: Callable[[int], None]
    ) -> tuple[Tensor, ...]: ...

    def read_adapters(self, layer: int, hosted: Sequence[int]) -> ExpertLowRank | None: ...


class _WithAdapters:
    """Reads experts with the adapters that `model` has."""

    def __init__(self, reader: ExpertReader, model: Qwen3Model) -> None:
        self._model, self.read = model, reader.read

    def read_adapters(self, layer: int, hosted: Sequence[int]) -> ExpertLowRank | None:
        files = self._model.adapter_files
        for each in files:
            each.check_unchanged()
        return read_expert_adapters(files, files, layer, hosted, self._model)


class ExpertReadThread(threading.Thread):
    """Reads one layer's new experts and prepares them on the device, in the format that the layer keeps its weights
    in.

    Waits for `previous`, the end of an earlier thread, before it reads. `prepared` or `error` is the outcome. Setting
    `dropped` makes it stop early; `ended` is set at its end."""

    def __init__(
        self,
        reader: Reader,
        moe: MoEFeedForward,
        layer: int,
        placement: ExpertPlacement,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        previous: threading.Event,
    ) -> None:
        super().__init__(name=f"experts of layer {layer}", daemon=True)
        self.moe = moe
        self.prepared: PreparedMove | None = None
        self.error: CheckpointError | None = None
        self.dropped = threading.Event()
        self.ended = threading.Event()
        self._reader = reader
        self._layer = layer
        self._placement = placement
        self._device = device
        self._stream = stream
        self._previous = previous

    def run(self) -> None:
        self._previous.wait()
        try:
            with on_stream(self._stream), torch.inference_mode():
                prepared = self.prepare()
            self.prepared = prepared  # the steps' thread polls this, so it is set when complete
        except _DroppedError:
            pass
        except Exception as error:  # noqa: BLE001 - after any error experts stay where they are and steps go on
            self.error = CheckpointError(f"the experts of layer {self._layer} could not be moved: {error}")
        finally:
            self.ended.set()

    def prepare(self) -> PreparedMove:
        """Reads and prepares the experts in the calling thread."""
        experts = list(self.moe.arrivals(self._placement).values())
        stacks = self._reader.read(self._layer, experts, self._check_dropped)
        here = (
            stack if stack.device == self._device else on_device(stack, stack.dtype, self._device)
            for stack in stacks
        )
        low_rank = self._reader.read_adapters(self._layer, self.moe.hosted_in(self._placement))
        return replace(self.moe.prepare_move(self._placement, tuple(here)), low_rank=low_rank)

    def _check_dropped(self, size: int) -> None:
        if self.dropped.is_set():
            raise _DroppedError
