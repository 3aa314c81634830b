"""Starts and ends the processes of ranks: the part that differs between Ray and local processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from qwen3_dist.errors import ResourceError
from qwen3_dist.protocol.messages import RankSpec


def rank_main(spec: RankSpec) -> None:
    """Runs a rank. Torch is imported in the rank's process, and not in that of an engine whose ranks are elsewhere."""
    from qwen3_dist.worker import rank

    rank.rank_main(spec)


class Launcher(ABC):
    """Starts the processes of ranks and can end them. Each has a seat: a place for one rank, with its card or its part
    of a bundle. Seats are numbered as the ranks of the layout that the launcher was made for."""

    host: str
    """The address at which ranks reach the engine's host."""
    device: str
    """Where the ranks run: "cpu" or "cuda"."""
    main: Callable[[RankSpec], None] = staticmethod(rank_main)
    """The module-level function that each process calls with its spec."""

    @abstractmethod
    def launch(self, specs: list[RankSpec]) -> None:
        """Starts every rank, each at the seat of its number. Raises ResourceError if there is no room for them."""

    def replace(self, spec: RankSpec, seat: int) -> None:
        """Starts a process for the rank of `spec` at a seat; one that still runs there ends. Raises ResourceError if
        that is not possible."""
        raise ResourceError("ranks of this kind cannot be replaced")

    def end(self, seats: Iterable[int]) -> None:
        """Ends the processes at these seats, if there are any."""
        raise ResourceError("ranks of this kind cannot be ended one by one")

    @abstractmethod
    def exit_reason(self, seats: Mapping[int, int]) -> str | None:
        """Which rank's process has ended, and why, among the ranks with these seats; None if none has, as far as the
        launcher knows."""

    @abstractmethod
    def stop(self) -> None:
        """Ends every process and frees its resources. May be called more than once."""
