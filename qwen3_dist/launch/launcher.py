"""Starts and ends the processes of ranks: the part that differs between Ray and local processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from qwen3_dist.errors import ResourceError
from qwen3_dist.protocol.messages import RankSpec


def rank_main(spec: RankSpec) -> None:
    """Runs a rank. Torch is imported in the rank's process, and not in that of an engine whose ranks are elsewhere."""
    from qwen3_dist.worker import rank

    rank.rank_main(spec)


class Launcher(ABC):
    """Starts one process per `RankSpec` and can end them all."""

    host: str
    """The address at which ranks reach the engine's host."""
    device: str
    """Where the ranks run: "cpu" or "cuda"."""
    main: Callable[[RankSpec], None] = staticmethod(rank_main)
    """The module-level function that each process calls with its spec."""

    @abstractmethod
    def launch(self, specs: list[RankSpec]) -> None:
        """Starts every rank. Raises ResourceError if there is no room for them."""

    def replace(self, spec: RankSpec) -> None:
        """Ends the process of the rank of `spec`, if it still runs, and starts another in its place. Raises
        ResourceError if that is not possible."""
        raise ResourceError("ranks of this kind cannot be replaced")

    @abstractmethod
    def exit_reason(self) -> str | None:
        """Which rank's process has ended, and why; None if none has, as far as the launcher knows."""

    @abstractmethod
    def stop(self) -> None:
        """Ends every process and frees its resources. May be called more than once."""
