"""The one interface through which an engine drives its ranks, wherever they run."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qwen3_dist.engine.plan import StepPlan, StepResult


class Executor(ABC):
    """A loaded model on `layout.world` ranks, with `num_blocks` KV-cache blocks on each."""

    num_blocks: int

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step on all ranks. Raises EngineDeadError if a rank is lost; then all are."""

    @abstractmethod
    def check(self) -> None:
        """Raises EngineDeadError if a rank has died since the last step. Cheap; call it when idle."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks and frees what they held. May be called more than once."""
