"""The messages between the engine and a rank, from the rank's start to its end.

rank                                   engine
── Hello(host, card, rendezvous port) ▶  chooses the transport of collectives, for all ranks
◀── Start(rendezvous address, sharing)
   join process groups, load weights
── Downloading, Loading ... ────────▶
── Loaded(blocks that fit) ─────────▶  the smallest number counts
◀──────────────────── num_blocks
── Ready ───────────────────────────▶
◀──────────── plan, Call, plan, ...   (None: end)
── result, Answer, ... ─────────────▶  (results: from tp rank 0 of the last stage only)

A rank that fails sends Failed instead. On a second connection, which it begins with StatusHello, a thread of the rank
answers each StatusRequest with a RankStatus: the engine asks while a step is late.

If a rank is lost, the engine sends Rejoin to the others: all begin with Hello again. They keep the model, and only the
new rank loads weights, unless the layout changes. A rank that waits for Start or for num_blocks may get Rejoin too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.expert_placement import Placements
from qwen3_dist.log_file import log_file
from qwen3_dist.protocol.card import Card
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes filled so far, bytes of this rank's shard)


@dataclass(frozen=True)
class RankSpec:
    """The arguments of a rank's process. `device` is "cpu" or "cuda". `card` is the index of the rank's GPU among
    those visible to its process; None until the launcher or the rank's process sets it. `attempt` numbers the engine's
    attempts to make ranks meet."""

    rank: int
    config: EngineConfig
    placements: Placements
    device: str
    address: tuple[str, int]
    secret: bytes
    card: int | None = None
    attempt: int = 0

    def moved(self, to: Rejoin) -> RankSpec:
        """The spec of this process as the rank that `to` makes it."""
        return replace(self, rank=to.rank, config=to.config, placements=to.placements, attempt=to.attempt)

    def is_placed_as(self, other: RankSpec) -> bool:
        """Whether both are the same rank of one layout, so that they hold the same weights but for moved experts."""
        return (self.rank, self.config.layout) == (other.rank, other.config.layout)


@dataclass(frozen=True)
class Hello:
    """Where a rank runs. Ranks of equal `host_id` share a machine and its memory. `store_port` is the port of rank 0's
    rendezvous store at the address `host`; None from other ranks."""

    rank: int
    pid: int
    host: str
    host_name: str
    host_id: str
    card: Card | None
    store_port: int | None
    attempt: int = 0  # that of RankSpec or Rejoin


@dataclass(frozen=True)
class StatusHello:
    """The first message on the second connection of a rank."""

    rank: int


@dataclass(frozen=True)
class StatusRequest:
    """Asks for a RankStatus."""


@dataclass(frozen=True)
class AbortCollectives:
    """Another rank was lost: end the collectives that wait for it. Rejoin follows on the first connection."""


@dataclass(frozen=True)
class RankStatus:
    """What a rank's main thread does.

    `operations` counts the collectives in shared memory that the rank has entered, `awaited` are the ranks that have
    not entered the last of them in some group; 0 and none where NCCL or gloo carries collectives. `stack` is a Python
    traceback.
    """

    activity: str
    operations: int
    awaited: tuple[int, ...]
    stack: str


@dataclass(frozen=True)
class Start:
    """How to join the other ranks. `ranks_on_card` ranks share this rank's card, which had `card_free_bytes` of free
    memory before any of them loaded. `over_host`: collectives of GPU tensors go through host memory."""

    store_address: tuple[str, int]
    ranks_on_host: int
    ranks_on_card: int
    card_free_bytes: int
    over_host: bool


@dataclass(frozen=True)
class Downloading:
    """More of the checkpoint has come from the hub to the rank's host."""


@dataclass(frozen=True)
class Loading:
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Loaded:
    num_blocks: int  # KV-cache blocks that fit beside the weights


@dataclass(frozen=True)
class Ready:
    """The rank is ready for plans. `backends` describes the device and its kernels in one line, `collectives` the
    transport of collectives. `may_repeat`: results may be void (`StepResult.overflowed`). `memory_bytes` is what the
    rank holds of its GPU, or else of its host."""

    backends: str
    collectives: str = ""
    may_repeat: bool = False
    memory_bytes: int = 0


@dataclass(frozen=True)
class Call:
    """A call of a method of the rank's runner, between two steps."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Rejoin:
    """Other ranks were lost or come back: leave the groups, say Hello again, and join as `rank` of the layout in
    `config`, with experts placed by `placements`."""

    rank: int
    config: EngineConfig
    placements: Placements
    attempt: int


@dataclass(frozen=True)
class Answer:
    value: Any


@dataclass(frozen=True)
class Failed:
    """The last message of a rank that fails. `error` is the cause; `details` is the traceback if it is a bug."""

    rank: int
    error: QwenDistError
    details: str

    def logged(self) -> QwenDistError:
        """The error. A traceback is logged; of a bug, the error says where."""
        if self.details:
            _log.error("rank %d failed:\n%s", self.rank, self.details)
        if not self.details or not isinstance(
            self.error, EngineDeadError
        ):  # which says all, if memory ran out
            return self.error
        place = log_file(_log) or "standard error"
        return type(self.error)(f"{self.error}; {place} has the traceback")
