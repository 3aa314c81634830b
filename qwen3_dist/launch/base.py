"""The interface through which an engine drives its ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import EngineDeadError
from qwen3_dist.expert_placement import Placements
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


@dataclass(frozen=True)
class Recovery:
    """The ranks that were replaced, how long that took, and the bytes of weights that the new ones read."""

    ranks: tuple[int, ...]
    seconds: float
    bytes_read: int

    def __str__(self) -> str:
        verb = "were" if len(self.ranks) > 1 else "was"
        return (
            f"{names(self.ranks)} {verb} replaced in {self.seconds:.1f} s and read {self.bytes_read:,} bytes"
        )


def names(ranks: Collection[int]) -> str:
    """ "rank 3", or "ranks 0, 1, 3"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, sorted(ranks)))}"


class Executor(ABC):
    """A loaded model on `layout.world` ranks, with `num_blocks` KV-cache blocks on each.

    A step has a plan and a result for each dp group; the result of a group without sequences is None. `device` is
    "cpu" or "cuda"; `backends` describes in a line what runs the steps, `collectives` what carries the collectives;
    `ranks` are in rank order.

    Steps run and are collected in the order in which they are submitted. Up to `depth` may be in flight: more than one
    if ranks can run a step while the engine plans the next. If a rank is lost, every call raises EngineDeadError, and
    all ranks end, unless `keeps_ranks`: then the others wait a few seconds for `recover`.
    """

    keeps_ranks = False
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
    def collect(self, limit_s: float | None = None) -> list[StepResult | None]:
        """Waits for the oldest step not yet collected and returns its results.

        A step that makes no progress after `limit_s` counts as hung, and the rank that the others wait for as lost.
        """

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

    def recover(self, placements: Placements | None) -> Recovery:
        """After the loss of ranks, starts others in their place, with experts placed by `placements`; the rest keep
        their weights. The KV cache is empty afterwards.

        Raises EngineDeadError if that does not work; `shutdown` is all that is left then.
        """
        raise EngineDeadError("this engine has no other process that could be started again")

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks and frees what they held. May be called more than once."""
