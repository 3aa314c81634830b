"""Writes checkpoints: whole or not at all, tensor by tensor."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_dist.errors import CheckpointError, ResourceError
from qwen3_dist.weights.files import CODES

_SIDECARS = (".json", ".jinja", ".txt")
_SPARE_BYTES = 64 << 20  # of the disk, for the small files

Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # dtypes, by torch's names, and shapes of tensors


@contextmanager
def new_directory(out: Path, num_bytes: int) -> Iterator[Path]:
    """A context with a directory that becomes `out` at its end, for a checkpoint of `num_bytes`. `out` must not exist,
    or be empty. After an error nothing is left.

    Raises CheckpointError for `out`, and ResourceError if the disk is too small or cannot be written.
    """
    out = Path(os.path.realpath(out))  # "." has no name, and a link would be replaced
    _check_replaceable(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(out.parent).free, num_bytes + _SPARE_BYTES
        if free < needed:
            raise ResourceError(
                f"{out} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room or give "
                "another --out"
            )
        partial.mkdir()
        yield partial
        partial.rename(out)
    except OSError as error:
        raise ResourceError(
            f"{out} could not be written ({error}); make room or give another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(
                f"{out} exists and is not an empty directory; remove it or give another --out"
            )
    except OSError as error:
        raise ResourceError(f"{out} cannot be read ({error.strerror}); give another --out") from None
    if out.is_mount():
        raise CheckpointError(
            f"{out} is a mount point, which cannot be replaced; give --out a directory in it"
        )


def copy_sidecars(path: Path, directory: Path) -> None:
    """Copies config, tokenizer and templates of the checkpoint at `path`."""
    for file in path.iterdir():
        if file.suffix in _SIDECARS and file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    if (templates := path / "additional_chat_templates").is_dir():
        shutil.copytree(templates, directory / templates.name)


def write_tensors(
    file: Path, entries: Entries, tensors: Iterable[Tensor], advance: Callable[[int], object]
) -> None:
    """Writes a safetensors file. `tensors`, contiguous and on the CPU, are those of `entries` one after the other,
    each in one or several. `advance` is called with numbers of bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + nbytes((dtype, shape))
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            advance(tensor.nbytes)
        stream.flush()
        os.fsync(stream.fileno())


def nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of such a dtype and shape."""
    dtype, shape = entry
    item: int = getattr(torch, dtype).itemsize
    return prod(shape) * item


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file as those of checkpoints are."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
