"""Moves experts among the ranks as their load asks: hot experts get copies, ranks equal work.

Ranks count the rows of each expert that they host. A layer is moved in one call between two steps: the ranks
read the experts that come to them, then all route by the new placement.
"""

from __future__ import annotations

import logging
import time

from qwen3_dist.engine.placements import ExpertLoad
from qwen3_dist.errors import CheckpointError
from qwen3_dist.executor.base import Executor
from qwen3_dist.parallel.expert_placement import ExpertPlacement, Placements
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_WORTH_MOVING = 0.95  # a placement with more than this of the imbalance there is is left alone


class ExpertBalance:
    """Reads the experts' load from the ranks and moves experts among them. Called between steps."""

    def __init__(self, executor: Executor, config: EngineConfig, placements: Placements) -> None:
        self._executor = executor
        self._config = config
        self._placements = dict(placements)
        self._before: dict[int, tuple[int, ...]] = {}  # each layer's tokens when it was last judged
        self._period_s = config.rebalance_experts_s if placements else None
        self._next_s = time.monotonic() + (self._period_s or 0)
        self._judged: ExpertLoad | None = None
        self._to_judge: list[int] = []

    def tick(self) -> None:
        """What `rebalance_experts_s` asks for now: at most one layer's move, so that no step waits for more."""
        if self._period_s is None or (not self._to_judge and time.monotonic() < self._next_s):
            return
        if not self._to_judge:
            self._next_s = time.monotonic() + self._period_s
            self._judged, self._to_judge = self.load(), sorted(self._placements)
        assert self._judged is not None
        try:
            self._rebalance(self._to_judge.pop(), self._judged)
        except CheckpointError as error:
            _log.warning("%s; they stay where they are", error)

    def rebalance_all(self) -> list[int]:
        """Moves every layer's experts to where the load since the last time wants them; the layers that changed.

        Raises CheckpointError for a layer that cannot be read, which stays as it is.
        """
        load = self.load()
        return [layer for layer in sorted(self._placements) if self._rebalance(layer, load)]

    def load(self) -> ExpertLoad:
        """Tokens since the start."""
        totals = {layer: [0] * placement.num_experts for layer, placement in self._placements.items()}
        for rank, counts in enumerate(self._executor.call("expert_counts")):
            if self._config.layout.coords(rank).etp_rank:
                continue  # it holds other columns of experts that have been counted
            for layer, of_experts in counts.items():
                for expert, count in of_experts.items():
                    totals[layer][expert] += count
        return ExpertLoad({layer: tuple(tokens) for layer, tokens in totals.items()}, dict(self._placements))

    def _rebalance(self, layer: int, load: ExpertLoad) -> bool:
        """Moves a layer's experts if what came since its last time makes it worth it."""
        old, tokens = self._placements[layer], load.tokens[layer]
        before = self._before.get(layer, (0,) * len(tokens))
        recent = [now - then for now, then in zip(tokens, before, strict=True)]
        self._before[layer] = tokens
        if not sum(recent):
            return False
        new = ExpertPlacement.balanced(recent, self._config.layout.ep, self._config.redundant_experts)
        new = new.keeping_places_of(old)
        if new == old or new.imbalance(recent) > _WORTH_MOVING * old.imbalance(recent):
            return False
        for error in self._executor.call("prepare_experts", layer, new):
            if error is not None:
                raise error
        self._executor.call("move_experts")
        self._placements[layer] = new
        return True
