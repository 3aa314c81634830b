"""Parallel layouts: `tp=2,dp=2,ep=4` as a value that validates itself against a model.

world = pp * dp * tp      rank = (stage * dp + group) * tp + tp_rank
ep * etp = dp * tp        the MoE layers of one stage run over all its dp * tp ranks
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ParallelLayoutError

_AXES = ("tp", "dp", "pp", "ep")


@dataclass(frozen=True)
class Layout:
    """How the ranks of one replica split the model. `Layout.parse` is the inverse of `str`."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in _AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ParallelLayoutError(f"{axis} must be a positive integer, not {size!r}")
        if self.stage_size % self.ep:
            fits = ", ".join(str(d) for d in divisors(self.stage_size))
            raise ParallelLayoutError(f"ep={self.ep} does not divide dp*tp={self.stage_size}; ep={fits} work")

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Reads `tp=2,ep=2` (any order, missing axes are 1). Raises ParallelLayoutError."""
        return text if isinstance(text, Layout) else cls(**layout_sizes(text))

    def __str__(self) -> str:
        parts = [f"{axis}={getattr(self, axis)}" for axis in _AXES if getattr(self, axis) > 1]
        return ",".join(parts) or "tp=1"

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage. They share the stage's MoE layers."""
        return self.dp * self.tp

    @property
    def etp(self) -> int:
        """Ranks that share the columns of one expert."""
        return self.stage_size // self.ep

    def layers_of(self, stage: int, n_layers: int) -> range:
        """The layers of pipeline stage `stage`."""
        return even_ranges(n_layers, self.pp)[stage]

    def coords(self, rank: int) -> RankCoords:
        """The coordinates of `rank` (0 <= rank < world)."""
        stage, member = divmod(rank, self.stage_size)
        group, tp_rank = divmod(member, self.tp)
        ep_rank, etp_rank = divmod(member, self.etp)
        return RankCoords(rank, stage, group, tp_rank, ep_rank, etp_rank)

    def validate(self, config: ModelConfig) -> None:
        """Raises ParallelLayoutError if this layout cannot split `config`. The message names sizes that work."""
        for problem in self._problems(config):
            raise ParallelLayoutError(problem)

    def fits(self, config: ModelConfig) -> bool:
        return next(self._problems(config), None) is None

    def _problems(self, config: ModelConfig) -> Iterator[str]:
        working_tp = [tp for tp in divisors(config.n_heads) if _kv_groups_split(config.n_kv_groups, tp)]
        if config.n_heads % self.tp:
            yield f"n_heads={config.n_heads} is not divisible by tp={self.tp}; {_list('tp', working_tp)} work"
        elif not _kv_groups_split(config.n_kv_groups, self.tp):
            yield (
                f"n_kv_groups={config.n_kv_groups} can be neither split over nor replicated onto "
                f"tp={self.tp} evenly; {_list('tp', working_tp)} work"
            )
        if config.n_layers < self.pp:
            yield f"pp={self.pp} is more than n_layers={config.n_layers}; pp={config.n_layers} is the most"
        if self.ep > 1 and not config.num_experts:
            yield f"ep={self.ep} needs a MoE checkpoint and this one is dense; leave ep out"
        if config.num_experts and self.ep > config.num_experts:
            working = [ep for ep in divisors(self.stage_size) if ep <= config.num_experts]
            yield f"ep={self.ep} is more than num_experts={config.num_experts}; {_list('ep', working)} work"


def layout_sizes(text: str) -> dict[str, int]:
    """The sizes in a text such as `tp=2,ep=2`, whether or not a layout can have them. Raises ParallelLayoutError for
    other text."""
    if not isinstance(text, str):
        raise ParallelLayoutError(f"layout must be text such as tp=2,ep=2, not {text!r}")
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(tp|dp|pp|ep)\s*=\s*(\d+)", part)
        if not match or match[1] in sizes:
            raise ParallelLayoutError(
                f"layout {text!r} has {part!r} where tp=N, dp=N, pp=N or ep=N (each once) is expected"
            )
        sizes[match[1]] = int(match[2])
    return sizes


@dataclass(frozen=True)
class RankCoords:
    """A rank's pipeline `stage`, its dp `group`, and its ranks within the tp, ep and etp groups."""

    rank: int
    stage: int
    group: int
    tp_rank: int
    ep_rank: int
    etp_rank: int


def valid_layouts(config: ModelConfig, world: int) -> list[Layout]:
    """All layouts of exactly `world` ranks that can split `config`."""
    layouts = [
        Layout(tp=tp, dp=dp, pp=pp, ep=ep)
        for pp in divisors(world)
        for dp in divisors(world // pp)
        for tp in [world // pp // dp]
        for ep in (divisors(dp * tp) if config.num_experts else [1])
    ]
    return [layout for layout in layouts if layout.fits(config)]


def nearest_layout(config: ModelConfig, wanted: str, most_ranks: int | None = None) -> Layout:
    """The layout that can split `config` and is nearest to the sizes that were `wanted`, which no layout need have: of
    as many ranks, but `most_ranks`, or else of the most below."""
    given = layout_sizes(wanted)
    sizes = {axis: max(1, given.get(axis, 1)) for axis in _AXES}

    def distance(layout: Layout) -> float:
        return sum(abs(math.log(getattr(layout, axis) / size)) for axis, size in sizes.items())

    ranks = sizes["pp"] * max(sizes["dp"] * sizes["tp"], sizes["ep"])
    for world in range(ranks if most_ranks is None else min(ranks, most_ranks), 0, -1):
        if layouts := valid_layouts(config, world):
            return min(layouts, key=distance)
    raise AssertionError("one rank holds any model")


def even_ranges(total: int, parts: int) -> list[range]:
    """Cuts `range(total)` into `parts` consecutive ranges whose lengths differ by at most one."""
    bounds = [part * total // parts for part in range(parts + 1)]
    return [range(lo, hi) for lo, hi in pairwise(bounds)]


def padded_range(total: int, parts: int, part: int) -> tuple[range, int]:
    """Cuts `total` into equal chunks, the last ones padded.

    Returns the real indices that `part` holds (maybe none) and the chunk's padded length.
    """
    chunk = -(-total // parts)
    return range(min(part * chunk, total), min((part + 1) * chunk, total)), chunk


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _kv_groups_split(n_kv_groups: int, tp: int) -> bool:
    return n_kv_groups % tp == 0 if tp <= n_kv_groups else tp % n_kv_groups == 0


def _list(axis: str, sizes: list[int]) -> str:
    return f"{axis}=" + ", ".join(map(str, sizes))
