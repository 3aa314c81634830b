"""The interface through which an engine drives its ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_dist.protocol.card import Card
from qwen3_dist.protocol.step_plan import StepPlan, StepResult


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs: the name of its host, its process there, and its GPU (None on the CPU).

    `memory_bytes` is what it held once it was ready: of its GPU, or else of its host.
    """

    rank: int
    host: str
    pid: int
    card: Card | None
    memory_bytes: int = 0


class Executor(ABC):
    """A loaded model on `layout.world` ranks, with `num_blocks` KV-cache blocks on each.

    A step has a plan and a result for each dp group; the result of a group without sequences is None. `device` is
    "cpu" or "cuda"; `backends` describes in a line what runs the steps, `collectives` what carries the collectives;
    `ranks` are in rank order.

    Steps run and are collected in the order in which they are submitted. Up to `depth` may be in flight: more than one
    if ranks can run a step while the engine plans the next. If a rank is lost, all ranks end and every call raises
    EngineDeadError.
    """

    may_repeat = False  # whether a result may be void (`overflowed`), so that its step must run again
    num_blocks: int
    device: str
    backends: str
    collectives: str
    ranks: tuple[RankPlace, ...]
    depth: int

    @abstractmethod
    def submit(self, plans: Sequence[StepPlan]) -> None:
        """Makes all ranks run a step after those submitted before. Does not wait for its result."""

    @abstractmethod
    def collect(self) -> list[StepResult | None]:
        """Waits for the oldest step not yet collected and returns its results."""

    def execute(self, plans: Sequence[StepPlan]) -> list[StepResult | None]:
        """Runs one step and returns its results."""
        self.submit(plans)
        return self.collect()

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every rank's `ModelRunner` between two steps. Returns the answers in rank order."""

    @abstractmethod
    def check(self) -> None:
        """Raises EngineDeadError if a rank has died since the last step. Cheap; call it when idle."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks and frees what they held. May be called more than once."""
