"""Which ranks an engine runs when it cannot have all: dp groups leave. Pure functions; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.expert_load import initial_placements
from qwen3_dist.errors import QwenDistError, ResourceError
from qwen3_dist.launch import Grouping
from qwen3_dist.layout import Layout, divisors
from qwen3_dist.settings import EngineConfig

_TRIES = 2  # starts of a rank that ends as it starts


def grouping_without(config: EngineConfig, model: ModelConfig, absent: Collection[int]) -> Grouping | None:
    """The ranks that `config` can have without those at the seats `absent`: all dp groups that lack none, with the
    experts placed anew over them. None if no group is whole."""
    layout = config.layout
    coords = [layout.coords(seat) for seat in range(layout.world)]
    broken = {coords[seat].group for seat in absent}
    groups = layout.dp - len(broken)
    if not groups:
        return None
    if broken:
        ep = _nearest_ep(layout, model, groups)
        most = model.num_experts * (ep - 1)
        config = replace(
            config,
            layout=Layout(layout.tp, groups, layout.pp, ep),
            redundant_experts=min(config.redundant_experts, most),
        )
    seats = tuple(at.rank for at in coords if at.group not in broken)
    return Grouping(config, initial_placements(config, model), seats)


def _nearest_ep(layout: Layout, model: ModelConfig, groups: int) -> int:
    """The ep of `layout` with so many dp groups: as many ranks share an expert's columns as before, or nearly."""
    if layout.ep == 1:
        return 1
    wanted = layout.ep * groups / layout.dp
    fitting = [ep for ep in divisors(groups * layout.tp) if ep <= model.num_experts]
    return min(fitting, key=lambda ep: abs(math.log(ep / wanted)))


def goes_without(failures: int, error: QwenDistError) -> bool:
    """Whether no more ranks are started in place of those that failed to start for so many times in a row, the last
    time by `error`: where there is no room, the next one would not have any either."""
    return failures >= _TRIES or isinstance(error, ResourceError)
