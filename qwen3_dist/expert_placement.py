"""Which ep rank hosts which experts, hot ones more than once, and which copy a token goes to. Imports no torch.

Legend: E experts of a layer, R redundant copies, C rows of the routing tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import even_ranges

_EVEN_UP_TO = 6  # copies of one expert among which tokens are spread exactly evenly


@dataclass(frozen=True)
class ExpertPlacement:
    """`hosted[r][i]` is the expert at place i of ep rank r's stack. Every expert is somewhere, on a rank once."""

    hosted: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, num_experts: int, ep: int, redundant: int = 0) -> ExpertPlacement:
        """Consecutive runs of experts whose lengths differ by at most one; copies as if all were equally hot."""
        if redundant:
            return cls.balanced([1.0] * num_experts, ep, redundant)
        return cls(tuple(tuple(run) for run in even_ranges(num_experts, ep)))

    @classmethod
    def balanced(cls, loads: Sequence[float], ep: int, redundant: int) -> ExpertPlacement:
        """Gives the `redundant` copies to the experts with the most load a copy, then places copies, the most
        loaded first, on the least loaded rank that has room (greedy, as in DeepSeek's EPLB)."""
        assert redundant <= len(loads) * (ep - 1), "an expert is on a rank once"
        copies = [1] * len(loads)
        for _ in range(redundant):
            hottest = max(
                (e for e in range(len(loads)) if copies[e] < ep), key=lambda e: (loads[e] / copies[e], -e)
            )
            copies[hottest] += 1
        room = [len(run) for run in even_ranges(len(loads) + redundant, ep)]
        hosted: list[set[int]] = [set() for _ in room]
        carried = [0.0] * ep
        shares = {e: loads[e] / copies[e] for e in range(len(loads))}
        for expert in sorted(shares, key=lambda e: (-shares[e], e)):
            for _ in range(copies[expert]):
                open_ranks = [r for r in range(ep) if len(hosted[r]) < room[r]]
                fitting = [r for r in open_ranks if expert not in hosted[r]]
                rank = min(fitting, key=lambda r: (carried[r], r)) if fitting else None
                if rank is None:  # all with room have it: a full rank takes it and gives one of its own away
                    taker = open_ranks[0]
                    rank = next(r for r in range(ep) if expert not in hosted[r])
                    given = min(hosted[rank] - hosted[taker], key=lambda e: (shares[e], e))
                    hosted[rank].remove(given)
                    hosted[taker].add(given)
                    carried[rank] -= shares[given]
                    carried[taker] += shares[given]
                hosted[rank].add(expert)
                carried[rank] += shares[expert]
        return cls(tuple(tuple(sorted(experts)) for experts in hosted))

    def keeping_places_of(self, other: ExpertPlacement) -> ExpertPlacement:
        """This one, with the experts that a rank has in `other` too where they lie there: fewer to move."""
        hosted = []
        for mine, theirs in zip(self.hosted, other.hosted, strict=True):
            assert len(mine) == len(theirs)
            fresh = iter(expert for expert in mine if expert not in theirs)
            hosted.append(tuple(expert if expert in mine else next(fresh) for expert in theirs))
        return ExpertPlacement(tuple(hosted))

    @property
    def num_experts(self) -> int:
        return len(self._homes)

    @cached_property
    def owners(self) -> list[list[int]]:
        """[C][E]: the ep rank to which row n of a batch goes for an expert is in table row n % C."""
        return [[rank for rank, _ in row] for row in self._routes]

    @cached_property
    def places(self) -> list[list[int]]:
        """[C][E]: where in that rank's stack the expert lies."""
        return [[place for _, place in row] for row in self._routes]

    def places_on(self, rank: int) -> list[list[int]]:
        """[C][E]: the same for what goes to `rank`, -1 for what goes elsewhere."""
        return [[place if owner == rank else -1 for owner, place in row] for row in self._routes]

    def imbalance(self, loads: Sequence[float]) -> float:
        """Load of the most loaded rank over the mean, if every expert had `loads`."""
        ranks = [
            sum(loads[expert] / len(self._homes[expert]) for expert in experts) for experts in self.hosted
        ]
        return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) else 1.0

    @cached_property
    def _homes(self) -> list[list[tuple[int, int]]]:
        """Of each expert, its copies as (rank, place)."""
        homes: dict[int, list[tuple[int, int]]] = {}
        for rank, experts in enumerate(self.hosted):
            for place, expert in enumerate(experts):
                homes.setdefault(expert, []).append((rank, place))
        return [homes[expert] for expert in sorted(homes)]

    @cached_property
    def _routes(self) -> list[list[tuple[int, int]]]:
        total = sum(len(experts) for experts in self.hosted)
        most = min(len(self.hosted), 1 + total - len(self._homes), _EVEN_UP_TO)
        rows = math.lcm(*range(1, most + 1))  # of the number of copies alone: a rebalance keeps the shape
        return [[copies[row % len(copies)] for copies in self._homes] for row in range(rows)]


Placements = Mapping[int, ExpertPlacement]  # by layer, of the MoE layers


def even_placements(config: ModelConfig, ep: int, redundant: int = 0) -> Placements:
    """Every MoE layer's experts placed evenly over `ep` ranks."""
    layers = [layer for layer in range(config.n_layers) if config.is_moe_layer(layer)]
    return dict.fromkeys(layers, ExpertPlacement.even(config.num_experts, ep, redundant)) if layers else {}
