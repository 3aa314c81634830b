"""How the processes of ranks are started and ended: the part of an executor that differs between Ray and without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.worker.rank import rank_main


class Launcher(ABC):
    """Starts one process per `RankSpec` and can end them all."""

    host: str
    """Address of the engine's host by which the ranks reach it."""
    device: str
    """Where the ranks run: "cpu" or "cuda"."""
    main: Callable[[RankSpec], None] = staticmethod(rank_main)
    """A module's function that each started process calls with its spec."""

    @abstractmethod
    def launch(self, specs: list[RankSpec]) -> None:
        """Starts every rank. Raises ResourceError if they have no room."""

    @abstractmethod
    def exit_reason(self) -> str | None:
        """Which rank's process has ended and why, if one has, as far as the launcher can tell."""

    @abstractmethod
    def stop(self) -> None:
        """Ends every process and frees its place. May be called more than once."""
