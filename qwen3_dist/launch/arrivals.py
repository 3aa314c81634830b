"""Ranks that were launched and are on their way to the engine."""

from __future__ import annotations

import secrets
import selectors
import time
from collections.abc import Mapping

from qwen3_dist.errors import EngineDeadError, ResourceError
from qwen3_dist.launch.base import Grouping, names
from qwen3_dist.launch.connections import RankConnections
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.rank_watch import RankWatch
from qwen3_dist.protocol.channel import Channel, ChannelClosedError, ChannelListener
from qwen3_dist.protocol.messages import Failed, Hello, RankSpec, StatusHello

_HELLO_S = 30.0  # from a rank's first byte to the end of its first message


class Arrivals:
    """The ranks of a grouping that have these `seats`, from their launch until the engine takes their connections: two
    of each, on the first of which it says Hello. They have `wait_s` for that."""

    def __init__(
        self, launcher: Launcher, to: Grouping, seats: Mapping[int, int], wait_s: float, attempt: int = 0
    ) -> None:
        self.to = to
        self._launcher, self._seats, self._attempt = launcher, seats, attempt
        self._wait_s, self._deadline = wait_s, time.monotonic() + wait_s
        self._failed: set[int] = set()
        self._listener = ChannelListener(launcher.host, secrets.token_bytes(32))
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._listener, selectors.EVENT_READ)
        self._hellos: dict[int, tuple[Hello, Channel]] = {}
        self._statuses: dict[int, Channel] = {}

    def specs(self) -> list[RankSpec]:
        to, at = self.to, (self._listener.address, self._listener.secret)
        return [
            RankSpec(rank, to.config, to.placements, self._launcher.device, *at, attempt=self._attempt)
            for rank in self._seats
        ]

    def launch(self) -> None:
        """Starts the ranks; what still runs at their seats ends. Raises ResourceError if that is not possible."""
        for spec in self.specs():
            self._launcher.replace(spec, self._seats[spec.rank])

    def are(self, to: Grouping, seats: Mapping[int, int]) -> bool:
        """Whether these are the ranks of `to` with these seats."""
        return self.to == to and self._seats == seats

    @property
    def missing_seats(self) -> frozenset[int]:
        """The seats of the ranks that have failed; if none has, of those that are not there yet."""
        missing = self._seats.keys() - (self._hellos.keys() & self._statuses.keys())
        return frozenset(self._seats[rank] for rank in self._failed or missing)

    def poll(self, timeout_s: float) -> bool:
        """Reads what arrives within `timeout_s`. Returns whether all ranks are there.

        Raises the error of a rank that fails, EngineDeadError if one has ended, or ResourceError if it is too late.
        """
        for key, _ in self._waiting.select(timeout_s):
            if key.fileobj is self._listener:
                if channel := self._listener.accept(timeout_s=0.2):
                    self._waiting.register(channel, selectors.EVENT_READ, channel)
                continue
            self._waiting.unregister(key.fileobj)
            self._keep(key.data)
        missing = self._seats.keys() - (self._hellos.keys() & self._statuses.keys())
        for rank, seat in self._seats.items() if missing else ():
            if reason := self._launcher.exit_reason({rank: seat}):
                self._failed.add(rank)
                raise EngineDeadError(f"a rank ended before it was ready: {reason}")
        if missing and time.monotonic() > self._deadline:
            raise ResourceError(f"{names(missing)} did not start within {self._wait_s:g} s")
        return not missing

    def hand_over(self, ranks: RankConnections, watch: RankWatch) -> list[Hello]:
        """Gives the connections of all ranks to the engine. Returns what they said."""
        hellos = []
        for rank, (hello, channel) in self._hellos.items():
            ranks.add(rank, channel)
            watch.add(rank, self._statuses[rank])
            hellos.append(hello)
        self._hellos, self._statuses = {}, {}
        return hellos

    def close(self) -> None:
        """Waits no more, and closes the connections that were not handed over."""
        for channel in (*(channel for _, channel in self._hellos.values()), *self._statuses.values()):
            channel.close()
        self._hellos, self._statuses = {}, {}
        self._waiting.close()
        self._listener.close()

    def end(self) -> None:
        """Ends the ranks, too."""
        self.close()
        self._launcher.end(self._seats.values())

    def _keep(self, channel: Channel) -> None:
        """Reads a rank's first message. Raises its error if it has failed."""
        try:
            message = channel.receive(_HELLO_S)
        except (ChannelClosedError, TimeoutError):
            channel.close()  # the launcher knows why
            return
        if isinstance(message, Failed):
            channel.close()
            self._failed.add(message.rank)
            raise message.logged()
        if isinstance(message, StatusHello):
            self._statuses[message.rank] = channel
        else:
            assert isinstance(message, Hello), message
            self._hellos[message.rank] = message, channel
