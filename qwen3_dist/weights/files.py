"""Reads slices of a checkpoint's safetensors files with little memory beyond what they fill."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen3_dist.errors import CheckpointError

_CHUNK_BYTES = 64 << 20
_REOPEN_BYTES = 128 << 20  # mapped pages that were read count as resident until the file is closed
# What names lack, and so begin with, in a checkpoint of the transformer without its head.
_PREFIX, _HEADLESS = "model.", ("embed_tokens.", "layers.", "norm.")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class CheckpointFiles:
    """The tensors of one checkpoint directory, by the names that they have in a model with a head; one that was
    saved without (Qwen3-Embedding) `is_headless`.

    Raises CheckpointError, naming the file, for one that is missing, truncated or no safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self._where: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for file, promised in shard_files(Path(path)).items():
            header = _read_header(file)
            absent = sorted(promised - header.keys())
            if absent:
                raise CheckpointError(f"{file} lacks {absent[0]} although the index names it; fetch it again")
            for name, entry in header.items():
                self._where[name] = (file, tuple(entry["shape"]), entry["dtype"])
        self.is_headless = any(name.startswith(_HEADLESS) for name in self._where)
        if self.is_headless:
            self._where = {f"{_PREFIX}{name}": where for name, where in self._where.items()}
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][1]

    def dtype(self, name: str) -> str:
        """ "float32", "bfloat16" or "float16". Raises CheckpointError for anything else."""
        file, _, code = self._where[name]
        if code not in _FLOATS:
            raise CheckpointError(
                f"{name} in {file} is stored as {code}; use a bf16, fp16 or fp32 checkpoint"
            )
        return _FLOATS[code]

    def read(
        self,
        name: str,
        index: tuple[slice, ...],
        out: Tensor,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Fills `out` (any device and float dtype) with tensor[index], a chunk of rows at a time.

        `progress` is told how many elements each chunk had.
        """
        self.dtype(name)
        file, shape, code = self._where[name]
        rows = range(*index[0].indices(shape[0]))
        row_bytes = max(1, _ITEM_BYTES[code] * out.numel() // max(1, len(rows)))
        step = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            chunk = self._slice_of(file, name)[(slice(part.start, part.stop), *index[1:])]
            out[start : start + len(part)].copy_(chunk)
            self._read_bytes += row_bytes * len(part)
            if self._read_bytes >= _REOPEN_BYTES:
                self._open, self._read_bytes = None, 0
            if progress:
                progress(chunk.numel())

    def _slice_of(self, file: Path, name: str) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = (file, safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from None
        return self._open[1].get_slice(name.removeprefix(_PREFIX) if self.is_headless else name)


def shard_files(path: Path) -> dict[Path, set[str]]:
    """The checkpoint's files, each with the tensors that an index says it holds.

    Raises CheckpointError if one is missing.
    """
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = {file: set[str]() for file in sorted(path.glob("*.safetensors"))}
        if not files:
            raise CheckpointError(
                f"{path} holds no *.safetensors file; convert or fetch the weights in that format"
            )
        return files
    shards: dict[Path, set[str]] = {}
    try:
        for name, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(path / shard, set()).add(name)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} is no weight index; fetch it again") from None
    for file in shards:
        if not file.exists():
            raise CheckpointError(f"{file} is missing although the index names it; fetch it again")
    return shards


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Names, shapes and dtypes of one file, with its length checked against them."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100 << 20):
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise CheckpointError(
            f"{file} is not a safetensors file, or its header is cut; fetch it again"
        ) from None
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes where its header asks for {end}; fetch it again")
    return header
