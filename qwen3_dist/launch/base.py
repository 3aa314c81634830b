"""The one interface through which an engine drives its ranks, wherever they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_dist.protocol.card import Card
from qwen3_dist.protocol.step_plan import StepPlan, StepResult


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs: the name of its host, its process there, and its GPU (None on the CPU)."""

    rank: int
    host: str
    pid: int
    card: Card | None


class Executor(ABC):
    """A loaded model on `layout.world` ranks, with `num_blocks` KV-cache blocks on each.

    A step is a plan for each dp group and has a result for each, None from those that had no sequences.
    `device` is "cpu" or "cuda"; `backends` says in a line what runs the steps there, `collectives` what carries the
    ranks' collectives; `ranks` are in rank order.

    Steps run in the order they are submitted, and are collected in it. Up to `depth` may be in flight:
    more than one where ranks can run a step while the engine plans the next. Both calls raise
    EngineDeadError if a rank is lost; then all are.
    """

    may_repeat = False  # whether a result may be void (`overflowed`), so that the step is run again
    num_blocks: int
    device: str
    backends: str
    collectives: str
    ranks: tuple[RankPlace, ...]
    depth: int

    @abstractmethod
    def submit(self, plans: Sequence[StepPlan]) -> None:
        """Has all ranks run a step after those submitted before."""

    @abstractmethod
    def collect(self) -> list[StepResult | None]:
        """Waits for the oldest step not yet collected."""

    def execute(self, plans: Sequence[StepPlan]) -> list[StepResult | None]:
        """One step from plans to results."""
        self.submit(plans)
        return self.collect()

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Has every rank's `ModelRunner` do something between two steps; what each answers, by rank."""

    @abstractmethod
    def check(self) -> None:
        """Raises EngineDeadError if a rank has died since the last step. Cheap; call it when idle."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks and frees what they held. May be called more than once."""
