"""Expert placement: which ep rank hosts which experts and their redundant copies, and which copy each token uses.

Imports no torch. Legend: E experts of a layer, C rows of the routing tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import even_ranges

_EVEN_UP_TO = 6  # up to this number of copies, tokens are spread exactly evenly among them


@dataclass(frozen=True)
class ExpertPlacement:
    """`hosted[r][i]` is the expert at index i of ep rank r's stacks. Every expert has a copy; a rank has at most
    one."""

    hosted: tuple[tuple[int, ...], ...]

    @classmethod
    def even(cls, num_experts: int, ep: int, redundant: int = 0) -> ExpertPlacement:
        """Gives each rank consecutive experts, in numbers that differ by at most one. `redundant` copies are placed as
        if all experts had equal load."""
        if redundant:
            return cls.balanced([1.0] * num_experts, ep, redundant)
        return cls(tuple(tuple(run) for run in even_ranges(num_experts, ep)))

    @classmethod
    def balanced(cls, loads: Sequence[float], ep: int, redundant: int) -> ExpertPlacement:
        """Gives the `redundant` copies one by one to the expert with the most load per copy. Then places copies, the
        most loaded first, on the least loaded rank that has room (greedy, as DeepSeek's EPLB)."""
        assert redundant <= len(loads) * (ep - 1), "a rank hosts an expert only once"
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
                if (
                    rank is None
                ):  # all ranks with room have it: a full rank takes it and gives one of its experts away
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
        """This placement, with experts that a rank also hosts in `other` at the same index, so that fewer must
        move."""
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
        """[C][E] the ep rank of the copy of each expert that token n uses, in row n % C."""
        return [[rank for rank, _ in row] for row in self._routes]

    @cached_property
    def places(self) -> list[list[int]]:
        """[C][E] the index of that copy in the stacks of its rank."""
        return [[place for _, place in row] for row in self._routes]

    def places_on(self, rank: int) -> list[list[int]]:
        """[C][E] the index of the copy if it is on `rank`, else -1."""
        return [[place if owner == rank else -1 for owner, place in row] for row in self._routes]

    def imbalance(self, loads: Sequence[float]) -> float:
        """The load of the most loaded rank over the mean, for these loads of the experts."""
        ranks = [
            sum(loads[expert] / len(self._homes[expert]) for expert in experts) for experts in self.hosted
        ]
        return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) else 1.0

    @cached_property
    def _homes(self) -> list[list[tuple[int, int]]]:
        """The copies of each expert, as (rank, index in its stacks)."""
        homes: dict[int, list[tuple[int, int]]] = {}
        for rank, experts in enumerate(self.hosted):
            for place, expert in enumerate(experts):
                homes.setdefault(expert, []).append((rank, place))
        return [homes[expert] for expert in sorted(homes)]

    @cached_property
    def _routes(self) -> list[list[tuple[int, int]]]:
        total = sum(len(experts) for experts in self.hosted)
        most = min(len(self.hosted), 1 + total - len(self._homes), _EVEN_UP_TO)
        rows = math.lcm(
            *range(1, most + 1)
        )  # depends only on the number of copies, so rebalancing keeps the shape
        return [[copies[row % len(copies)] for copies in self._homes] for row in range(rows)]


Placements = Mapping[int, ExpertPlacement]  # by layer, of the MoE layers


def even_placements(config: ModelConfig, ep: int, redundant: int = 0) -> Placements:
    """Even placements of all MoE layers over `ep` ranks."""
    layers = [layer for layer in range(config.n_layers) if config.is_moe_layer(layer)]
    return dict.fromkeys(layers, ExpertPlacement.even(config.num_experts, ep, redundant)) if layers else {}
