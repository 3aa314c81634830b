"""Writes a plain checkpoint's weights as codes, tensor by tensor: fp8 as Qwen's own checkpoints are, int8 and int4 as
compressed-tensors. Experts get tensors of their own, also if they were fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.layout import Layout
from qwen3_dist.ops.quantize import INT4_GROUP, TILE, as_fp8, as_int4, as_int8, packed
from qwen3_dist.text.sidecars import read_json_object
from qwen3_dist.weights.checks import check_checkpoint
from qwen3_dist.weights.files import FLOATS, CheckpointFiles
from qwen3_dist.weights.new_checkpoint import copy_sidecars, nbytes, new_directory, write_json, write_tensors
from qwen3_dist.weights.pieces import SCALE
from qwen3_dist.weights.weight_plan import WeightPlan

FORMATS = ("fp8", "int8", "int4")
SHARD_BYTES = 5 * 10**9
_BLOCK = 128
_PER_WORD = 8  # codes of 4 bits in an int32
_ROUNDING: dict[str, Any] = {
    "observer": "minmax", "observer_kwargs": {}, "group_size": None, "block_structure": None, "actorder": None,
}  # fmt: skip
_NUMBER: dict[str, Any] = {**_ROUNDING, "type": "int", "symmetric": True, "dynamic": False}
_INT8: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {**_NUMBER, "num_bits": 8, "strategy": "channel"},
    "input_activations": {**_NUMBER, "num_bits": 8, "strategy": "token", "dynamic": True, "observer": None},
    "output_activations": None,
    "format": "int-quantized",
}
_INT4: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {**_NUMBER, "num_bits": 4, "strategy": "group", "group_size": INT4_GROUP},
    "input_activations": None,
    "output_activations": None,
    "format": "pack-quantized",
}


@dataclass(frozen=True)
class _Source:
    """A tensor of the checkpoint, or a matrix of it: its `rows`, of one `expert` if it is a stack. `name`: of the
    tensor that is written. `rounds`: whether that is codes."""

    source: str
    name: str
    rows: range
    inner: tuple[int, ...]
    dtype: str
    rounds: bool
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.inner


@dataclass(frozen=True)
class Conversion:
    """A plain checkpoint at `path` that is to be written in `form`, one of FORMATS."""

    path: Path
    form: str
    files: CheckpointFiles
    sources: tuple[_Source, ...]

    @classmethod
    def open(cls, path: Path, form: str) -> Conversion:
        """Checks all headers. Raises CheckpointError and ConfigError for a checkpoint that does not fit its
        config.json, is quantised already, or has weights that groups do not divide, which vLLM would not read."""
        plain = ModelConfig.from_directory(path)
        if plain.quantization is not None:
            raise CheckpointError(
                f"the weights in {path} are quantised already ({plain.quantization.method}); give the bf16, fp16 "
                "or fp32 checkpoint that they were made from"
            )
        config = plain.rounded("fp8")  # every format rounds the same matrices
        check_checkpoint(path, plain)
        files = CheckpointFiles(path)
        sources = tuple(_sources(config, files))
        cut = next((each for each in sources if each.rounds and each.inner[0] % INT4_GROUP), None)
        if form == "int4" and cut is not None:
            raise CheckpointError(
                f"{cut.name} has {cut.inner[0]} inputs, which are no multiple of {INT4_GROUP}; write fp8 or int8, or "
                "round it with --quantize int4 as it loads"
            )
        return cls(path, form, files, sources)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(nbytes(entry) for each in self.sources for entry in self._entries(each).values())

    def write(self, out: Path, advance: Callable[[int], None]) -> None:
        """Writes the new checkpoint to the directory `out`, which must not exist or be empty; nothing of it is there
        before all is. `advance` is called with numbers of bytes written.

        Raises CheckpointError for `out`, and ResourceError if the disk is too small or cannot be written.
        """
        with new_directory(out, self.total_bytes) as directory:
            self._write_all(directory, advance)

    def _write_all(self, directory: Path, advance: Callable[[int], None]) -> None:
        shards, weight_map = self._shards(), dict[str, str]()
        for number, sources in enumerate(shards, start=1):
            name = (
                f"model-{number:05}-of-{len(shards):05}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            weight_map |= dict.fromkeys(self._write_shard(directory / name, sources, advance), name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(directory / "model.safetensors.index.json", index)
        copy_sidecars(self.path, directory)
        raw = read_json_object(self.path / "config.json")
        write_json(directory / "config.json", {**raw, "quantization_config": self._settings()})

    def _shards(self) -> list[list[_Source]]:
        shards: list[list[_Source]] = [[]]
        size = 0
        for each in self.sources:
            more = sum(map(nbytes, self._entries(each).values()))
            if shards[-1] and size + more > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(each)
            size += more
        return shards

    def _entries(self, source: _Source) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that are written for a source, in order: their dtypes and shapes."""
        if not source.rounds:
            return {source.name: (source.dtype, source.shape)}
        outputs, inputs = source.shape
        if self.form == "int8":
            return {source.name: ("int8", source.shape), f"{source.name}_scale": ("float32", (outputs, 1))}
        if self.form == "int4":
            return {
                f"{source.name}_packed": ("int32", (outputs, inputs // _PER_WORD)),
                f"{source.name}_scale": ("bfloat16", (outputs, inputs // INT4_GROUP)),
                f"{source.name}_shape": ("int64", (2,)),
            }
        blocks = (-(-outputs // _BLOCK), -(-inputs // _BLOCK))
        return {
            source.name: ("float8_e4m3fn", source.shape),
            f"{source.name}_scale_inv": ("float32", blocks),
        }

    def _write_shard(
        self, file: Path, sources: Sequence[_Source], advance: Callable[[int], None]
    ) -> list[str]:
        """Returns the names of the tensors in the file."""
        entries = {name: entry for each in sources for name, entry in self._entries(each).items()}
        write_tensors(file, entries, (tensor for each in sources for tensor in self._tensors(each)), advance)
        return list(entries)

    def _tensors(self, source: _Source) -> Iterator[Tensor]:
        """What is written for a source, in parts: its numbers, or codes, scales and the rest."""
        width = prod(source.inner)
        step = max(1, TILE // max(1, width * _BLOCK)) * _BLOCK
        scales = []
        for first in range(0, len(source.rows), step):
            rows = source.rows[first : first + step]
            dtype = torch.float32 if source.rounds else getattr(torch, source.dtype)
            part = torch.empty(len(rows), *source.inner, dtype=dtype)
            index = (slice(rows.start, rows.stop),)
            if source.expert is None:
                self.files.read(source.source, index, part)
            else:
                stack = slice(source.expert, source.expert + 1)
                self.files.read(source.source, (stack, *index), part[None])
            if not source.rounds:
                yield part
                continue
            codes, some = self._rounded(part)
            if not bool(some.isfinite().all()):
                raise CheckpointError(
                    f"{source.source} has numbers that are infinite or none, or too large to round; fetch the "
                    "checkpoint again"
                )
            scales.append(some)
            yield codes.contiguous()
        if scales:
            yield torch.cat(scales)
        if scales and self.form == "int4":
            yield torch.tensor(source.shape)

    def _rounded(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and scales of rows of a weight, as they are written."""
        if self.form == "fp8":
            return as_fp8(part, _BLOCK, _BLOCK)
        if self.form == "int8":
            return as_int8(part)
        numbers, scales = as_int4(part)
        return packed(numbers), scales.bfloat16()

    def _settings(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        names = [each.source for each in self.sources if not each.rounds and len(each.inner)]
        plain = [name.removesuffix(".weight") for name in names if "embed_tokens" not in name]
        ignored = sorted({"lm_head", *plain})
        if self.form == "fp8":
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [_BLOCK, _BLOCK],
                "modules_to_not_convert": ignored,
            }
        group = _INT8 if self.form == "int8" else _INT4
        return {
            "quant_method": "compressed-tensors",
            "format": group["format"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }


def _sources(config: ModelConfig, files: CheckpointFiles) -> Iterator[_Source]:
    """What is to be written, in the order of layers."""
    layout, prefix = Layout(), "model." if files.is_headless else ""
    for piece in WeightPlan(config, layout, files.names()).pieces(layout.coords(0)):
        if files.is_headless and piece.source == "lm_head.weight":
            continue
        dtype, name = files.dtype(piece.source, FLOATS), piece.source.removeprefix(prefix)
        if piece.rounds is None:
            yield _Source(piece.source, name, range(piece.shape[0]), piece.shape[1:], dtype, False)
        elif piece.stored != SCALE and len(piece.shape) == 2:
            yield _Source(piece.source, name, piece.rounds, piece.shape[1:], dtype, True)
        elif piece.stored != SCALE:
            base, _, stack = name.rpartition(".")
            half = "up_proj" if piece.rounds.start else "gate_proj"
            kind = half if stack == "gate_up_proj" else stack
            for expert in range(piece.shape[0]):
                of_expert = f"{base}.{expert}.{kind}.weight"
                yield _Source(piece.source, of_expert, piece.rounds, piece.shape[2:], dtype, True, expert)
