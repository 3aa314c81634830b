"""The rank's side of a change of weights. A thread reads the headers of the new files while steps go on; once no step
runs, a thread loads them into place. The engine's side is `engine/weight_changes.py`.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import torch

from qwen3_dist.errors import CheckpointError, QwenDistError
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.replacement import Replacement
from qwen3_dist.weights.version_files import directory_of
from qwen3_dist.weights_version import WeightsVersion
from qwen3_dist.worker.background import Background


class WeightChange:
    """Changes the weights of one rank's model. Methods are called between steps and never wait."""

    def __init__(self, model: Qwen3Model, config: EngineConfig, own: Path) -> None:
        """`own` is the directory of the model's own weights."""
        self._model, self._config, self._own = model, config, own
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._opening: Background[Replacement] | None = None
        self._loading: Background[int] | None = None
        self._stop = threading.Event()  # of what loads

    def open(self, weights: WeightsVersion) -> None:
        """Starts to check whether the weights fit this rank's part of the model."""
        work = partial(open_weights, weights, self._model, self._config, self._own)
        self._opening = Background(f"the weights {weights}", work, None)
        self._opening.start()

    @property
    def opened(self) -> bool | QwenDistError:
        """Whether the weights fit; the error if they do not."""
        assert self._opening is not None, "open comes first"
        return self._opening.arrived

    def load(self) -> None:
        """Starts to load what was opened, in place of what loads already. No step may run until it is there."""
        opening, self._opening = self._opening, None
        assert opening is not None and opening.result is not None, "the engine asks first"
        self._stop.set()
        before, self._stop = self._loading, threading.Event()
        work = partial(self._load, opening.result, before, self._stop)
        self._loading = Background("the weights", work, self._stream)
        self._loading.start()

    def _load(self, replacement: Replacement, before: threading.Thread | None, stop: threading.Event) -> int:
        def check(done: int, total: int) -> None:
            if stop.is_set():
                raise CheckpointError("other weights are loaded instead")

        if before is not None:
            before.join()
        if self._stream is not None:  # a rank that answers no step may still run the last one
            torch.cuda.synchronize(self._model.device)
        replacement.load(check)
        return replacement.num_bytes

    @property
    def loaded(self) -> bool | QwenDistError:
        """Whether the weights are there; the error if they cannot be loaded."""
        assert self._loading is not None, "load comes first"
        return self._loading.arrived

    def finish(self) -> int:
        """Frees what loading took. Returns the bytes that this rank has loaded."""
        loading, self._loading = self._loading, None
        assert loading is not None and loading.result is not None, "the engine asks first"
        return loading.result

    def drop(self) -> None:
        """Undoes `open`."""
        self._opening = None

    def close(self) -> None:
        """Ends what loads, after which some weights may be old ones."""
        self._stop.set()
        if self._loading is not None:
            self._loading.join()


def open_weights(weights: WeightsVersion, model: Qwen3Model, config: EngineConfig, own: Path) -> Replacement:
    """This rank's part of the weights for a model that was loaded by `config`, and whose own weights are in the
    directory `own`. Raises CheckpointError if they do not fit."""
    random = config.load_format == "random" and not weights.path
    return Replacement(weights, directory_of(weights, own), model, config.quantize == "int8", random)
