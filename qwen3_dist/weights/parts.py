"""Tensors of a checkpoint that lie in parts, as `qwen3-dist shard` writes them: NAME[0:64,0:4096] is the part of NAME
with these indices along each dimension. Parts may overlap."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

from qwen3_dist.errors import CheckpointError

_PART = re.compile(r"(?P<name>.+)\[(?P<ranges>\d+:\d+(,\d+:\d+)*)\]")

Index = tuple[slice, ...]


class Entry(NamedTuple):
    """A tensor, or a part of one: its file, first byte there, shape, and dtype by safetensors' name."""

    file: Path
    start: int
    shape: tuple[int, ...]
    code: str


class Part(NamedTuple):
    """A part of a tensor, with its indices along each dimension."""

    ranges: tuple[range, ...]
    entry: Entry


def part_name(name: str, ranges: Sequence[range]) -> str:
    """The name of a part of tensor `name`."""
    return f"{name}[{','.join(f'{each.start}:{each.stop}' for each in ranges)}]"


def take_parts(entries: dict[str, Entry]) -> dict[str, list[Part]]:
    """Puts whole tensors in the place of parts. Returns the parts by tensor. Raises CheckpointError for parts that do
    not belong together."""
    parts: dict[str, list[Part]] = {}
    for full in list(entries):
        if (match := _PART.fullmatch(full)) is None:
            continue
        entry = entries.pop(full)
        bounds = (each.split(":") for each in match["ranges"].split(","))
        ranges = tuple(range(int(start[-18:]), int(stop[-18:])) for start, stop in bounds)
        is_sound = part_name(match["name"], ranges) == full and all(ranges)
        if not is_sound or tuple(map(len, ranges)) != entry.shape or match["name"] in entries:
            raise CheckpointError(f"{full} in {entry.file} is not such a part; shard the checkpoint again")
        parts.setdefault(match["name"], []).append(Part(ranges, entry))
    for name, found in parts.items():
        if len({(len(part.ranges), part.entry.code) for part in found}) > 1:
            raise CheckpointError(f"the parts of {name} differ; shard the checkpoint again")
        shape = tuple(max(part.ranges[d].stop for part in found) for d in range(len(found[0].ranges)))
        if not _cover(found, shape):
            raise CheckpointError(f"a part of {name} is missing; shard the checkpoint again")
        entries[name] = found[0].entry._replace(shape=shape)
    return parts


def pieces_of(parts: Sequence[Part], ranges: Sequence[range]) -> Iterator[tuple[Entry, list[range], Index]]:
    """What to read for a region of a tensor: entries, the indices in each, and their places in the region."""
    same = next((part for part in parts if part.ranges == tuple(ranges)), None)
    for part in parts if same is None else [same]:
        common = [
            range(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(part.ranges, ranges, strict=True)
        ]
        if not all(common):
            continue
        inside = [_moved(each, -own.start) for each, own in zip(common, part.ranges, strict=True)]
        place = [_moved(each, -own.start) for each, own in zip(common, ranges, strict=True)]
        yield part.entry, inside, tuple(slice(each.start, each.stop) for each in place)


def _cover(parts: Sequence[Part], shape: tuple[int, ...]) -> bool:
    """Whether each number of a tensor is in a part; parts may overlap."""
    bounds = [
        {edge for part in parts for edge in (part.ranges[d].start, part.ranges[d].stop)}
        for d in range(len(shape))
    ]
    cuts = [sorted({0, *edges}) for edges in bounds]  # between them, parts hold all numbers or none
    cells = {
        cell
        for part in parts
        for cell in product(
            *([at for at in edges if at in own] for edges, own in zip(cuts, part.ranges, strict=True))
        )
    }
    return len(cells) == prod(len(edges) - 1 for edges in cuts)


def _moved(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)
