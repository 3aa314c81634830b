"""What changes on an engine's ranks between two steps: places of experts, adapters, weights, sleep."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qwen3_dist.engine.adapter_changes import AdapterChanges
from qwen3_dist.engine.expert_balance import ExpertBalance
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.engine.weight_changes import WeightChanges
from qwen3_dist.expert_placement import Placements
from qwen3_dist.launch.base import Executor, Grouping
from qwen3_dist.settings import EngineConfig


class RankChanges:
    """The changes of an engine of `config`, whose experts lie as in `placements`. Called between steps.

    `unfinished` returns the sequences that run or wait. `adopt` is told which settings of EngineConfig the ranks take
    up. `forget_cache` is that of `WeightChanges`.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        placements: Placements,
        unfinished: Callable[[], Iterable[Sequence]],
        adopt: Callable[..., None],
        forget_cache: Callable[[bool], None],
    ) -> None:
        self.experts = ExpertBalance(executor, config, placements)
        self.adapters = AdapterChanges(executor, config, unfinished, lambda lora: adopt(lora=lora))
        self.weights = WeightChanges(executor, config, lambda weights: adopt(weights=weights), forget_cache)

    def restart(self, ranks: Grouping) -> None:
        """Tells that the engine runs other ranks, which have what is in their config, and no sequence is left."""
        self.experts.restart(ranks.config, ranks.placements)
        self.adapters.restart(ranks.config.lora)
        self.weights.restart(ranks.config.weights)

    @property
    def is_busy(self) -> bool:
        """Whether something changes, so that `tick` must be called even if no step runs."""
        waits = self.weights.asleep and not self.weights.is_busy  # then experts and adapters change after it
        return not waits and (self.experts.is_busy or self.adapters.is_busy or self.weights.is_busy)

    @property
    def holds_steps(self) -> bool:
        """Whether no step is to be planned now."""
        return self.adapters.is_ready or self.weights.holds_steps

    def tick(self, idle: bool) -> None:
        """Continues changes. `idle`: no step is in flight. Weights change while nothing else does."""
        weights = self.weights
        if not weights.has_begun and not weights.asleep:
            self.experts.tick(waits=self.adapters.are_read)
            self.adapters.tick(idle, waits=self.experts.are_read)
        if weights.has_begun or weights.asleep or not (self.experts.is_busy or self.adapters.is_busy):
            weights.tick(idle)
