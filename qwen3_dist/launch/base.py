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
from qwen3_dist.settings import EngineConfig


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
class Grouping:
    """The ranks of an engine: their layout, in `config`, where experts lie, and the seat of each rank, in rank order.
    Seats are numbered as the ranks of the layout that the engine was started with."""

    config: EngineConfig
    placements: Placements
    seats: tuple[int, ...]


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
    all ranks end, unless `keeps_ranks`: then the others wait a few seconds for `regroup`.
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

    @property
    def lost_seats(self) -> frozenset[int]:
        """The seats of the ranks whose loss, or whose failure to start, was the cause of the last error; empty if they
        are not known."""
        return frozenset()

    def regroup(self, to: Grouping, wait_s: float) -> int:
        """Makes the ranks those of `to`. Ranks that run and have a seat in `to` keep their processes, and the weights
        that they need there. Others are started, or were invited to the same grouping and have arrived. The
        KV cache is empty afterwards. Returns the bytes of weights that were read.

        Raises QwenDistError if a rank is lost meanwhile, or does not start within `wait_s`: `lost_seats` tells which,
        and another `regroup` may follow, or `shutdown`.
        """
        raise EngineDeadError("this engine has no other process that could be started again")

    def invite(self, to: Grouping, wait_s: float) -> None:
        """Starts the ranks of `to` that do not run, while steps go on. Raises ResourceError if that is not possible;
        `dismiss` must follow."""
        raise EngineDeadError("this engine has no other process that could be started again")

    def arrived(self) -> bool:
        """Whether all ranks that were invited are there, ready for `regroup`. Does not wait. Raises QwenDistError if
        one does not start within the time of `invite`; `dismiss` must follow."""
        return False

    @property
    def missing_seats(self) -> frozenset[int]:
        """The seats of the invited ranks that do not start, or that have not yet."""
        return frozenset()

    def dismiss(self) -> None:
        """Ends the ranks that were invited, if any."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks and frees what they held. May be called more than once."""
