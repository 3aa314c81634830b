"""Watches what torch's operators do with tensors of a fake card."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Counts the operators on the device and keeps those for which a host would wait until it has done all before."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []
        self.bytes_held = self.peak_bytes = 0
        self.floats: set[tuple[int, ...]] = set()  # shapes of the tensors of floats that were made
        self._held: set[int] = set()

    def restart(self) -> None:
        """Counts from here on, and the peak over what is held now."""
        for each in (self.operators, self.kernels, self.waits, self.floats):
            each.clear()
        self.peak_bytes = self.bytes_held

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._held:
            self._held.add(key)
            self.bytes_held += size
            self.peak_bytes = max(self.peak_bytes, self.bytes_held)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.bytes_held -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for x in made:
            if x.is_cuda:
                self._hold(x.untyped_storage())
                if x.is_floating_point() and x.element_size() > 1 and not func.is_view:
                    self.floats.add(tuple(x.shape))
        if any(x.is_cuda for x in (*given, *made)):
            name = str(func)
            self.operators[name] += not func.is_view and "empty" not in name and not name.startswith("prim.")
            # Single numbers of the host go along as arguments, but not where torch first makes tensors of them.
            by_value = [] if "index_put" in name else [x for x in given if not x.dim() and not x.is_cuda]
            devices = {x.device.type for x in (*given, *made) if all(x is not each for each in by_value)}
            queued = kwargs.get("non_blocking") or (name.startswith("aten.copy_") and args[2:3] == (True,))
            if len(devices) > 1 and not queued:
                self.waits.append(f"{name} in {_caller()}")
        return out


def _caller() -> str:
    """The innermost line of the library's."""
    frames = [frame for frame in traceback.extract_stack() if "/qwen3_dist/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "a test"
