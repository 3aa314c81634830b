"""The rank's side of a change of LoRA adapters. A thread reads those that are new while steps go on; between two steps
they take the place of what the rank has. The engine's side is `engine/adapter_changes.py`.
"""

from __future__ import annotations

from functools import partial

import torch

from qwen3_dist.errors import QwenDistError
from qwen3_dist.lora_adapters import NextAdapters
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.weights.lora_loader import LowRanks, read_adapters, use_adapters
from qwen3_dist.worker.background import Background


class AdapterChange:
    """Changes the adapters of one rank's model. Methods are called between steps and never wait."""

    def __init__(self, model: Qwen3Model) -> None:
        self._model = model
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._reading: Background[LowRanks] | None = None
        self._to = NextAdapters(model.adapters, ())

    def start(self, to: NextAdapters) -> None:
        """Starts to read what `to` needs beside what the rank has. Drops what an earlier call has read."""
        self._to = to
        self._reading = Background("the LoRA adapters", partial(self._read, to), self._stream)
        self._reading.start()

    @property
    def arrived(self) -> bool | QwenDistError:
        """Whether everything has been read; the error if it cannot be."""
        assert self._reading is not None, "start comes first"
        return self._reading.arrived

    def finish(self) -> None:
        """Makes the model use what was read, from the next step on. No step may be in flight."""
        reading, self._reading = self._reading, None
        assert reading is not None and reading.result is not None, "the engine asks first"
        use_adapters(self._to.adapters, self._model, reading.result)

    def drop(self) -> None:
        """Undoes `start`."""
        self._reading = None

    def _read(self, to: NextAdapters) -> LowRanks:
        low_ranks = read_adapters(to, self._model)
        if self._stream is not None:
            self._compile(to, low_ranks)
        return low_ranks

    def _compile(self, to: NextAdapters, low_ranks: LowRanks) -> None:
        """Runs the products of the adapters once, so that no step compiles their kernels."""
        held = range(1, 1 + len(to.adapters.pairs) + len(to.leaving))
        rows = AdapterRows.of(held, self._model.device)
        for layer, low_rank in low_ranks.linears.items():
            assert rows is not None
            x, y = (
                self._model.activation_template.new_zeros(len(held), width)
                for width in (layer.in_features, layer.out_features)
            )
            low_rank.add(y, x, rows)
