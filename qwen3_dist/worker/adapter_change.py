"""The rank's side of a change of LoRA adapters. A thread reads those that are new while steps go on; between two steps
they take the place of what the rank has. The engine's side is `engine/adapter_changes.py`.
"""

from __future__ import annotations

import threading

import torch

from qwen3_dist.errors import CheckpointError, QwenDistError, ResourceError
from qwen3_dist.lora_adapters import NextAdapters
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.weights.lora_loader import LowRanks, read_adapters, use_adapters
from qwen3_dist.worker.expert_moves import on_stream


class AdapterChange:
    """Changes the adapters of one rank's model. Methods are called between steps and never wait."""

    def __init__(self, model: Qwen3Model) -> None:
        self._model = model
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._reading: _ReadThread | None = None

    def start(self, to: NextAdapters) -> None:
        """Starts to read what `to` needs beside what the rank has. Drops what an earlier call has read."""
        self._reading = _ReadThread(self._model, to, self._stream)
        self._reading.start()

    @property
    def arrived(self) -> bool | QwenDistError:
        """Whether everything has been read; the error if it cannot be."""
        assert self._reading is not None, "start comes first"
        return self._reading.error or self._reading.low_ranks is not None

    def finish(self) -> None:
        """Makes the model use what was read, from the next step on. No step may be in flight."""
        reading, self._reading = self._reading, None
        assert reading is not None and reading.low_ranks is not None, "the engine asks first"
        use_adapters(reading.to.adapters, self._model, reading.low_ranks)

    def drop(self) -> None:
        """Undoes `start`."""
        self._reading = None


class _ReadThread(threading.Thread):
    """Reads adapters beside those that a model has. `low_ranks` or `error` is the outcome."""

    def __init__(self, model: Qwen3Model, to: NextAdapters, stream: torch.cuda.Stream | None) -> None:
        super().__init__(name="LoRA adapters", daemon=True)
        self.to = to
        self.low_ranks: LowRanks | None = None
        self.error: QwenDistError | None = None
        self._model, self._stream = model, stream

    def run(self) -> None:
        try:
            with on_stream(self._stream), torch.inference_mode():
                low_ranks = read_adapters(self.to, self._model)
                if self._stream is not None:
                    self._compile(low_ranks)
            self.low_ranks = low_ranks  # the steps' thread polls this, so it is set when complete
        except QwenDistError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - after any error the adapters stay and steps go on
            kind = ResourceError if "memory" in str(error).lower() else CheckpointError
            self.error = kind(f"the LoRA adapters could not be loaded: {error}")

    def _compile(self, low_ranks: LowRanks) -> None:
        """Runs the products of the adapters once, so that no step compiles their kernels."""
        held = range(1, 1 + len(self.to.adapters.pairs) + len(self.to.leaving))
        rows = AdapterRows.of(held, self._model.device)
        for layer, low_rank in low_ranks.linears.items():
            assert rows is not None
            x, y = (
                self._model.activation_template.new_zeros(len(held), width)
                for width in (layer.in_features, layer.out_features)
            )
            low_rank.add(y, x, rows)
