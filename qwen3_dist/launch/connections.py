"""The engine's connections to its ranks. When ranks are lost, it finds the rank that caused it."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import IntEnum
from typing import Any

from qwen3_dist.errors import EngineDeadError, PeerLostError, QwenDistError
from qwen3_dist.launch.base import names
from qwen3_dist.launch.rank_watch import RankWatch
from qwen3_dist.protocol.channel import Channel, ChannelClosedError, pack
from qwen3_dist.protocol.messages import Failed, Hello

_ROOT_CAUSE_WAIT_S = 1.0  # how long to wait for other ranks to report the root cause
_MESSAGE_S = 30.0  # for the rest of a message that has begun


class RankConnections:
    """A channel to each rank. Sending never waits: data that a socket does not accept is sent later, while the engine
    waits for messages. `exit_reason()` says why a rank's process has ended, if one has."""

    def __init__(self, exit_reason: Callable[[], str | None]) -> None:
        self._exit_reason = exit_reason
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int, Channel] = {}

    def add(self, rank: int, channel: Channel) -> None:
        self._channels[rank] = channel
        self._selector.register(channel, selectors.EVENT_READ, rank)

    def drop(self, rank: int) -> None:
        """Closes the channel of a lost rank."""
        channel = self._channels.pop(rank)
        if channel.fileno() in self._selector.get_map():
            self._selector.unregister(channel)
        channel.close()

    def renumber(self, ranks: Mapping[int, int]) -> None:
        """Gives the ranks, by their old numbers, new ones."""
        self._channels = {new: self._channels[old] for old, new in ranks.items()}
        for rank, channel in self._channels.items():
            if channel.fileno() in self._selector.get_map():
                self._selector.modify(channel, self._selector.get_key(channel).events, rank)

    def await_hello(self, rank: int, attempt: int, timeout_s: float) -> Hello:
        """Waits for the Hello with which a rank answers Rejoin; what it sent before that is void. Raises
        EngineDeadError if the rank sends nothing for `timeout_s`."""
        channel = self._channels[rank]
        try:
            while not (
                isinstance(message := channel.receive(timeout_s), Hello) and message.attempt == attempt
            ):
                pass
        except (ChannelClosedError, TimeoutError):
            raise EngineDeadError(f"rank {rank} did not join again within {timeout_s:g} s") from None
        if channel.fileno() not in self._selector.get_map():
            self._selector.register(channel, selectors.EVENT_READ, rank)
        return message

    @property
    def ranks(self) -> Collection[int]:
        return self._channels.keys()

    def post(self, rank: int, packed: bytes) -> None:
        """Sends a packed message. A dead rank is noticed when its messages are read; the last one gives the reason."""
        with contextlib.suppress(ChannelClosedError):
            if not self._channels[rank].post(packed):
                self._watch(rank, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def post_all(self, message: Any) -> None:
        packed = pack(message)
        for rank in self._channels:
            self.post(rank, packed)

    def is_silent(self) -> bool:
        """Whether no rank has sent a message or ended. Also sends waiting data."""
        return not any(mask & selectors.EVENT_READ for _, mask in self._ready(0))

    def next_message(
        self, deadline: float, late: Callable[[], str], watch: RankWatch | None = None
    ) -> tuple[int, Any]:
        """Returns the next message of any rank, with the rank.

        Raises RankLostError if a rank has failed or ended, if `watch` finds that one hangs, or at the deadline
        (monotonic clock); then `late()` is the message: which ranks did not do what.
        """
        while True:
            left = deadline - time.monotonic()
            for rank, mask in self._ready(max(0.0, min(left, watch.period_s) if watch else left)):
                if mask & selectors.EVENT_READ:
                    return rank, self._receive(rank)
            if watch and (hang := watch.look()):
                raise RankLostError(EngineDeadError(hang.message), Blame.OWN, hang.ranks)
            if left <= 0:
                stuck = [rank for rank, channel in self._channels.items() if channel.has_unsent]
                also = f"; {names(stuck)} stopped reading what the engine sends" if stuck else ""
                raise RankLostError(EngineDeadError(f"{late()}{also}"), Blame.UNKNOWN)

    @contextlib.contextmanager
    def reporting_root_cause(self) -> Iterator[None]:
        """A context that replaces a RankLostError by the error of the rank that caused it, if that rank reports
        one."""
        try:
            yield
        except RankLostError as loss:
            raise self._root_cause(loss) from None

    def await_ends(self, timeout_s: float) -> None:
        """Waits until every rank has closed its channel, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for rank, mask in self._ready(left):
                if mask & selectors.EVENT_READ:
                    try:
                        self._channels[rank].receive(timeout_s=1.0)
                    except (ChannelClosedError, TimeoutError):
                        self._selector.unregister(self._channels[rank])

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels = {}
        self._selector.close()

    def _ready(self, timeout_s: float) -> list[tuple[int, int]]:
        """Ranks whose sockets are ready, with their event masks. Sends waiting data."""
        events = [(key.data, mask) for key, mask in self._selector.select(timeout_s)]
        for rank, mask in events:
            if mask & selectors.EVENT_WRITE:
                with contextlib.suppress(ChannelClosedError):
                    if not self._channels[rank].flush():
                        continue
                self._watch(rank, selectors.EVENT_READ)
        return events

    def _watch(self, rank: int, events: int) -> None:
        channel = self._channels[rank]
        if channel.fileno() in self._selector.get_map():
            self._selector.modify(channel, events, rank)

    def _receive(self, rank: int) -> Any:
        channel = self._channels[rank]
        try:
            message = channel.receive(timeout_s=_MESSAGE_S)
        except (ChannelClosedError, TimeoutError):
            self._selector.unregister(channel)
            reason = self._await_exit_reason() or "its process ended"
            how = reason.removeprefix(f"rank {rank}: ")
            raise RankLostError(EngineDeadError(f"rank {rank} died: {how}"), Blame.OWN, [rank]) from None
        if isinstance(message, Failed):
            self._selector.unregister(channel)
            raise RankLostError(message.logged(), _blame(message.error), [rank])
        return message

    def _await_exit_reason(self) -> str | None:
        """Why a rank's process has ended. The system may know it a moment after the connection broke."""
        deadline = time.monotonic() + _ROOT_CAUSE_WAIT_S
        while not (reason := self._exit_reason()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return reason

    def _root_cause(self, first: RankLostError) -> RankLostError:
        """When one rank fails, the others fail because it is missing. Reads their reports to find the cause."""
        losses, deadline = [first], time.monotonic() + _ROOT_CAUSE_WAIT_S
        while (
            all(loss.blame is not Blame.OWN for loss in losses)
            and self._selector.get_map()
            and time.monotonic() < deadline
        ):
            try:
                self.next_message(deadline, lambda: "")
            except RankLostError as loss:
                losses.append(loss)
        cause = min(losses, key=lambda loss: loss.blame)
        silent = [key.data for key in self._selector.get_map().values()]
        if cause.blame is Blame.PROBABLE and "timed out" in str(cause).lower() and silent:
            found = f"{names(silent)} kept the others waiting: {cause}"
            return RankLostError(EngineDeadError(found), Blame.PROBABLE, silent)
        return cause


class Blame(IntEnum):
    """How certain it is that a lost rank is the cause and not a victim, most certain first."""

    OWN = 0
    PROBABLE = 1
    VICTIM = 2
    UNKNOWN = 3


def _blame(error: QwenDistError) -> Blame:
    if isinstance(error, PeerLostError):
        return Blame.VICTIM
    if isinstance(error, EngineDeadError):
        return Blame.PROBABLE  # any exception; collectives raise the same when a peer dies
    return Blame.OWN


class RankLostError(Exception):
    """`ranks` are lost; none if it is not known which. `blame` says how certain it is that `error` is the cause."""

    def __init__(self, error: QwenDistError, blame: Blame, ranks: Collection[int] = ()) -> None:
        super().__init__(str(error))
        self.error = error
        self.blame = blame
        self.ranks = ranks
