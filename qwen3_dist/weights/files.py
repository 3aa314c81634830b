"""Finds a checkpoint's safetensors files and their tensors, and reads regions of them with little extra memory."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.parts import Entry, Index, pieces_of, take_parts

if TYPE_CHECKING:  # headers are read in processes that do not load torch
    import torch
    from torch import Tensor

    from qwen3_dist.weights.file_reader import FileReader, Read

_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<total>\d+)\.safetensors")
_OF_OTHERS = ("adapter_model", "consolidated")  # LoRA's weights, and Mistral's format
_PICKLE = (
    "a pickle, which can run code as it is read, so convert weights that you trust with transformers: "
    "AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype='auto').save_pretrained(NEW_DIRECTORY), and copy "
    "the tokenizer's files to it"
)
_OTHER_FORMATS = {
    **dict.fromkeys((".bin", ".pt", ".pth"), _PICKLE),
    ".gguf": "of llama.cpp's format, so fetch the checkpoint that it was made from",
    **dict.fromkeys(
        (".h5", ".msgpack", ".onnx"), "of another framework, so fetch the checkpoint for PyTorch"
    ),
}
# Names in a checkpoint without a head lack the prefix, so they begin with these.
_PREFIX, _HEADLESS = "model.", ("embed_tokens.", "layers.", "norm.")
_DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "I8": "int8",
    "F8_E8M0": "float8_e8m0fnu", "I32": "int32", "I64": "int64", "U8": "uint8",
}  # fmt: skip
_WORDS = ("I32", "I64", "U8")  # dtypes of packed numbers and of indices, never of plain weights
CODES = {name: code for code, name in _DTYPES.items()}  # safetensors' name of a dtype, by torch's
FLOATS = ("float32", "bfloat16", "float16")
_ITEM_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "F8_E8M0": 1, "I32": 4, "I64": 8, "U8": 1,
}  # fmt: skip


class CheckpointFiles:
    """The tensors of one checkpoint directory, by their names in a model with a head. `is_headless`: the checkpoint
    was saved without a head (Qwen3-Embedding).

    `files` are the files to read, by default those of `shard_files`. Raises CheckpointError, naming the file, for a
    file that is missing, truncated or not in safetensors format, and for a tensor that is in two files.
    """

    def __init__(self, path: str | Path, files: Mapping[Path, set[str] | None] | None = None) -> None:
        self._entries: dict[str, Entry] = {}
        for file, named in (shard_files(Path(path)) if files is None else files).items():
            header, data = _read_header(file)
            absent = sorted((named or set()) - header.keys())
            if absent:
                raise CheckpointError(f"{file} lacks {absent[0]} although the index names it; fetch it again")
            for name in header if named is None else named:
                if name in self._entries:
                    raise CheckpointError(
                        f"{self._entries[name].file} and {file.name} both hold {name}, and no index says which is "
                        "right; remove the file that is not the model's"
                    )
                entry = header[name]
                start = data + entry["data_offsets"][0]
                self._entries[name] = Entry(file, start, tuple(entry["shape"]), entry["dtype"])
        self._parts = take_parts(self._entries)
        self.is_headless = any(name.startswith(_HEADLESS) for name in self._entries)
        if self.is_headless:
            self._entries = {f"{_PREFIX}{name}": entry for name, entry in self._entries.items()}
            self._parts = {f"{_PREFIX}{name}": parts for name, parts in self._parts.items()}

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str, allowed: Sequence[str] = FLOATS) -> str:
        """A tensor's dtype by torch's name. Raises CheckpointError if it is not one of `allowed`."""
        file, *_, code = self._entries[name]
        dtype = _DTYPES.get(code, code)
        if dtype not in allowed:
            advice = (
                "use a bf16, fp16 or fp32 checkpoint" if allowed == FLOATS else f"{allowed[0]} is expected"
            )
            raise CheckpointError(f"{name} in {file} is stored as {code}; {advice}")
        return dtype

    def is_code(self, name: str) -> bool:
        """Whether a tensor has one of the dtypes of weights that need a scale."""
        return self._entries[name].code in ("F8_E4M3", "I8")

    def torch_dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype. Raises CheckpointError if it is not known."""
        import torch

        code = self._entries[name].code
        if code not in _DTYPES:
            self.dtype(name)  # says what is wrong
        found: torch.dtype = getattr(torch, _DTYPES[code])
        return found

    def place(self, name: str, index: tuple[slice, ...]) -> tuple[Path, int]:
        """The file of tensor[index] and a byte there, from which it is read."""
        return next(self._pieces(name, _ranges(self.shape(name), index)))[0][:2]

    def _pieces(self, name: str, ranges: list[range]) -> Iterator[tuple[Entry, list[range], Index]]:
        """What to read for a region of a tensor: entries, the indices in each, and their places in the region."""
        parts = self._parts.get(name)
        if parts is None:
            return iter([(self._entries[name], ranges, ())])
        return pieces_of(parts, ranges)

    def reads(
        self,
        name: str,
        index: tuple[slice, ...],
        out: Tensor,
        progress: Callable[[int], object] = lambda elements: None,
    ) -> Iterator[Read]:
        """The reads that fill `out` (any device and dtype) with tensor[index]. The dtype was checked by `dtype`.

        `progress` is called with the number of elements of each.
        """
        from qwen3_dist.weights.file_reader import reads_of

        dtype = self.torch_dtype(name)
        if self._entries[name].code in _WORDS and out.is_floating_point():
            self.dtype(name)  # says what is wrong
        for entry, ranges, place in self._pieces(name, _ranges(self.shape(name), index)):
            yield from reads_of(entry, dtype, ranges, out[place], progress)

    def read(
        self,
        name: str,
        index: tuple[slice, ...],
        out: Tensor,
        progress: Callable[[int], object] = lambda elements: None,
    ) -> None:
        """Fills `out` as `reads` says. For one thread."""
        self._reader.run(self.reads(name, index, out, progress))

    def take(self, name: str, index: tuple[slice | int, ...]) -> Tensor:
        """tensor[index], in the dtype in which it is stored; for small parts."""
        import torch

        slices = tuple(slice(at, at + 1) if isinstance(at, int) else at for at in index)
        shape = [len(each) for each in _ranges(self.shape(name), slices)]
        part = torch.empty(shape, dtype=self.torch_dtype(name))
        self.read(name, slices, part)
        return part[tuple(0 if isinstance(at, int) else slice(None) for at in index)]

    def read_whole(self, name: str) -> Tensor:
        """A small tensor."""
        return self.take(name, ())

    @cached_property
    def _reader(self) -> FileReader:
        from qwen3_dist.weights.file_reader import FileReader

        return FileReader()


def _ranges(shape: tuple[int, ...], index: Sequence[slice]) -> list[range]:
    """The indices along each dimension."""
    parts = (*index, *(slice(None) for _ in shape[len(index) :]))
    return [range(*part.indices(size)) for part, size in zip(parts, shape, strict=True)]


def has_weights(path: Path) -> bool:
    """Whether `path` holds a file of weights, in whatever format."""
    return any(file.suffix in (".safetensors", *_OTHER_FORMATS) for file in path.iterdir())


def shard_files(path: Path) -> dict[Path, set[str] | None]:
    """The files of the checkpoint at `path`, each with the names of the tensors to read from it; None: all.

    These are the files of the index. Without an index, they are model.safetensors, else numbered shards, else all
    files except those of adapters and of other formats. Raises CheckpointError if one is missing.
    """
    if (index := path / "model.safetensors.index.json").exists() or index.is_symlink():
        return _indexed(index)
    if (whole := path / "model.safetensors").exists():
        return {whole: None}
    names = sorted(file.name for file in path.glob("*.safetensors"))
    shards = _numbered(path, names) or [name for name in names if not name.startswith(_OF_OTHERS)]
    if not shards:
        raise CheckpointError(f"{path} holds no *.safetensors file of a model; {_advice(path)}")
    return {path / name: None for name in shards}


def _advice(path: Path) -> str:
    """What to do about the weights in `path`, of which no file is one of safetensors."""
    others = [file for file in path.iterdir() if file.suffix in _OTHER_FORMATS]
    if not others:
        return "fetch the weights in that format"
    largest = max(others, key=lambda file: file.stat().st_size if file.exists() else 0)
    return f"{largest.name} is {_OTHER_FORMATS[largest.suffix]}"


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    shards: dict[Path, set[str]] = {}
    try:
        text = index.read_text(encoding="utf-8")
        for name, shard in json.loads(text, object_pairs_hook=_unique)["weight_map"].items():
            if Path(shard).is_absolute() or ".." in Path(shard).parts:
                raise ValueError
            shards.setdefault(index.parent / shard, set()).add(name)
        missing = [file for file in shards if not file.exists()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{index} is not a valid weight index; fetch it again") from None
    if missing:
        raise CheckpointError(f"{missing[0]} is missing although the index names it; fetch it again")
    return dict(shards)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has a name twice, of which readers take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _numbered(path: Path, names: list[str]) -> list[str]:
    """The shards 1 to N of one checkpoint among `names`; [] if none is numbered."""
    found = [match for match in map(_SHARD.fullmatch, names) if match]
    if not found:
        return []
    of = {(match["stem"], match["total"]) for match in found}
    if len(of) > 1:
        raise CheckpointError(
            f"{path} holds shards of several checkpoints, {found[0][0]} and {found[-1][0]}, and no index; keep one's"
        )
    [(stem, total)] = of
    wanted = (f"{stem}-{number:0{len(total)}}-of-{total}.safetensors" for number in range(1, int(total) + 1))
    if missing := next((name for name in wanted if name not in names), None):
        raise CheckpointError(f"{path / missing} is missing; fetch it again")
    return sorted(match[0] for match in found)


def _read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Reads the header (names, shapes, dtypes) of one file and checks the file's length against it. Returns the header
    and the first byte of the data."""
    try:
        with open(file, "rb", opener=_open_file) as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100 << 20):
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = _checked_end(header)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); make it readable or fetch it again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise CheckpointError(
            f"{file} is not a safetensors file, or its header is cut; fetch it again"
        ) from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file} has {size} bytes where its header asks for {8 + length + end}; fetch it again"
        )
    return header, 8 + length


def _open_file(path: str, flags: int) -> int:
    """Opens a file, and nothing else: a pipe would wait for a writer."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return descriptor


def _checked_end(header: dict[str, dict[str, Any]]) -> int:
    """The end of the last tensor. Raises ValueError, KeyError or TypeError for a header that safetensors' definition
    does not allow: tensors lie one after the other, without holes, and none overlaps another."""
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        first, last = entry["data_offsets"]
        item = _ITEM_BYTES.get(entry["dtype"])
        if any(type(number) is not int or number < 0 for number in (first, last, *entry["shape"])):
            raise ValueError
        if first != end or last < first or item and last - first != prod(entry["shape"]) * item:
            raise ValueError
        end = last
    return end
