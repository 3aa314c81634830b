"""Writes a checkpoint anew with a file for each rank of a layout, so that each rank reads plainly what it needs and no
more. Tensors that ranks cut lie in parts (`parts.py`), so every other layout can read the result too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.layout import Layout
from qwen3_dist.weights.checks import check_checkpoint
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.new_checkpoint import copy_sidecars, nbytes, new_directory, write_tensors
from qwen3_dist.weights.parts import part_name
from qwen3_dist.weights.weight_plan import WeightPlan

_STEP_BYTES = 64 << 20
_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Region:
    """The part of a checkpoint's tensor with these indices along each dimension."""

    source: str
    ranges: tuple[range, ...]


@dataclass(frozen=True)
class Sharding:
    """The checkpoint at `path` that is to be written for a layout: the regions of each file."""

    path: Path
    files: CheckpointFiles
    shards: tuple[tuple[_Region, ...], ...]

    @classmethod
    def open(cls, path: Path, layout: Layout) -> Sharding:
        """Checks all headers. Raises CheckpointError and ConfigError for a checkpoint that does not fit its
        config.json or the layout, and for one whose numbers are packed in words, which parts might cut."""
        config = ModelConfig.from_directory(path)
        layout.validate(config)
        check_checkpoint(path, config)
        files = CheckpointFiles(path)
        if files.is_headless:  # as ranks load it
            config = replace(config, tie_word_embeddings=True)
        plan = WeightPlan(config, layout, files.names())
        seen: set[_Region] = set()
        shards = []
        for rank in range(layout.world):
            regions = []
            for piece in plan.pieces(layout.coords(rank)):
                if piece.packing is not None:
                    raise CheckpointError(
                        f"{piece.source} has packed numbers, which shard does not cut; use the checkpoint as it is"
                    )
                shape = files.shape(piece.source)
                whole = shape != piece.shape  # a single scale, or a scale without a dimension
                ranges = tuple(map(range, shape)) if whole else tuple(piece.ranges)
                regions.append(_Region(piece.source, ranges))
            shards.append([each for each in dict.fromkeys(regions) if each not in seen])
            seen.update(regions)
        # Where one rank reads the whole and another a part, as scales of blocks at the edge, there is one place.
        wholes = {each.source for each in seen if tuple(map(len, each.ranges)) == files.shape(each.source)}
        shards = [[each for each in shard if each.source not in wholes] for shard in shards]
        shards[0] += [_Region(name, tuple(map(range, files.shape(name)))) for name in sorted(wholes)]
        covered = {each.source for each in seen} | {_TIED_HEAD}
        others = (name for name in sorted(files.names() - covered))
        shards[0] += [_Region(name, tuple(map(range, files.shape(name)))) for name in others]
        return cls(path, files, tuple(tuple(shard) for shard in shards if shard))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(nbytes(entry) for shard in self.shards for entry in self._entries(shard).values())

    def write(self, out: Path, advance: Callable[[int], object]) -> None:
        """Writes the new checkpoint to the directory `out`, as `new_directory` does. `advance` is called with
        numbers of bytes."""
        with new_directory(out, self.total_bytes) as directory:
            copy_sidecars(self.path, directory)
            count = len(self.shards)
            for number, shard in enumerate(self.shards, 1):
                file = directory / f"model-{number:05}-of-{count:05}.safetensors"
                write_tensors(file, self._entries(shard), self._tensors(shard), advance)

    def _entries(self, shard: tuple[_Region, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        entries = {}
        for region in shard:
            shape = tuple(map(len, region.ranges))
            is_whole = shape == self.files.shape(region.source)
            name = region.source.removeprefix("model.") if self.files.is_headless else region.source
            dtype = str(self.files.torch_dtype(region.source)).removeprefix("torch.")
            entries[name if is_whole else part_name(name, region.ranges)] = (dtype, shape)
        return entries

    def _tensors(self, shard: tuple[_Region, ...]) -> Iterator[Tensor]:
        """The regions one after the other, in rows that are not too many at once."""
        for region in shard:
            dtype = self.files.torch_dtype(region.source)
            rows, *inner = region.ranges or (range(1),)
            row_bytes = nbytes((str(dtype).removeprefix("torch."), tuple(map(len, inner))))
            step = max(1, _STEP_BYTES // max(1, row_bytes))
            for first in range(rows.start, rows.stop, step):
                part = range(first, min(first + step, rows.stop)), *inner
                tensor = torch.empty([len(each) for each in part], dtype=dtype)
                index = tuple(slice(each.start, each.stop) for each in part) if region.ranges else ()
                self.files.read(region.source, index, tensor if region.ranges else tensor.view(()))
                yield tensor
