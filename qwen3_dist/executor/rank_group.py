"""The executor of ranks in other processes: brings them up together, drives them, notices their end.

How processes are started and ended is a `Launcher`'s business (`processes.py`, `ray_ranks.py`); all
else, from rendezvous to the step, is the same for all of them and lies here.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import selectors
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NoReturn

from qwen3_dist.engine.plan import StepPlan, StepResult
from qwen3_dist.errors import EngineDeadError, QwenDistError, ResourceError
from qwen3_dist.executor.base import Executor, RankPlace
from qwen3_dist.executor.cards import use_of_cards
from qwen3_dist.executor.channel import Channel, ChannelListener, pack
from qwen3_dist.executor.messages import (
    Answer,
    Call,
    Failed,
    Hello,
    Loaded,
    Loading,
    RankSpec,
    Ready,
    Start,
)
from qwen3_dist.executor.rank import rank_main
from qwen3_dist.parallel.expert_placement import Placements
from qwen3_dist.parallel.shared_memory import PeerLostError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.loader import Progress

_log = logging.getLogger(__name__)
_ROOT_CAUSE_WAIT_S = 1.0  # how long the other ranks may take to say what really happened
_STOP_WAIT_S = 3.0


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
        """Why a rank's process has ended, if one has, as far as the launcher can tell."""

    @abstractmethod
    def stop(self) -> None:
        """Ends every process and frees its place. May be called more than once."""


class RankGroupExecutor(Executor):
    """Drives the ranks that `launcher` starts. Construction returns when all are ready for plans."""

    def __init__(
        self,
        config: EngineConfig,
        launcher: Launcher,
        placements: Placements | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Without `placements` experts lie evenly."""
        self._config = config
        self._placements = placements or {}
        self._launcher = launcher
        self._deadline = time.monotonic() + config.start_timeout_s
        self._selector = selectors.DefaultSelector()
        self._channels: dict[int, Channel] = {}
        self._submitted: deque[Sequence[StepPlan]] = deque()
        self._results: list[deque[StepResult]] = [deque() for _ in range(config.layout.dp)]
        self._death: QwenDistError | None = None
        self.device = launcher.device
        self.depth = config.layout.pp if config.layout.pp > 1 else 2 if config.overlap else 1
        try:
            self._start(progress)
        except BaseException:
            self.shutdown()
            raise

    def submit(self, plans: Sequence[StepPlan]) -> None:
        self._raise_if_dead()
        packed = [pack(plan) for plan in plans]
        with self._losing_ranks():
            for rank, channel in self._channels.items():
                channel.send_packed(packed[self._config.layout.coords(rank).group])
        self._submitted.append(plans)

    def collect(self) -> list[StepResult | None]:
        self._raise_if_dead()
        plans = self._submitted.popleft()
        deadline = time.monotonic() + self._config.step_timeout_s
        answering = [bool(plan.sequences) for plan in plans]
        with self._losing_ranks():
            while not all(map(bool, itertools.compress(self._results, answering))):
                self._keep_result(*self._next_message(deadline))
        results = [
            arrived.popleft() if answers else None
            for arrived, answers in zip(self._results, answering, strict=True)
        ]
        assert all(result is None or result.step == plans[0].step for result in results)
        return results

    def call(self, method: str, *arguments: Any) -> list[Any]:
        self._raise_if_dead()
        deadline = time.monotonic() + self._config.step_timeout_s
        answers: dict[int, Any] = {}
        with self._losing_ranks():
            for channel in self._channels.values():
                channel.send(Call(method, arguments))
            while len(answers) < len(self._channels):
                rank, message = self._next_message(deadline)
                if isinstance(message, Answer):
                    answers[rank] = message.value
                else:
                    self._keep_result(rank, message)  # of a step that was submitted before
        return [answers[rank] for rank in sorted(answers)]

    def _keep_result(self, rank: int, message: Any) -> None:
        assert isinstance(message, StepResult), message
        self._results[self._config.layout.coords(rank).group].append(message)

    def check(self) -> None:
        self._raise_if_dead()
        with self._losing_ranks():
            if self._selector.select(0):
                rank, message = self._next_message(time.monotonic() + 1.0)
                raise AssertionError(f"rank {rank} sent {message!r} unasked")

    def shutdown(self) -> None:
        if self._death is None:
            self._death = EngineDeadError("the engine was shut down")
            for channel in self._channels.values():
                with contextlib.suppress(EOFError):
                    channel.send(None)
            self._await_ends(time.monotonic() + _STOP_WAIT_S)
        self._launcher.stop()
        for channel in self._channels.values():
            channel.close()
        self._channels = {}
        self._selector.close()

    def _start(self, progress: Progress | None) -> None:
        secret = secrets.token_bytes(32)
        world = self._config.layout.world
        listener = ChannelListener(self._launcher.host, secret)
        try:
            self._launcher.launch(
                [
                    RankSpec(
                        rank, self._config, self._placements, self._launcher.device, listener.address, secret
                    )
                    for rank in range(world)
                ]
            )
            hellos = self._accept_all(listener, world)
        finally:
            listener.close()
        self._introduce(hellos)
        fitting = self._await_all(Loaded, progress)
        self.num_blocks = min(loaded.num_blocks for loaded in fitting)
        for channel in self._channels.values():
            channel.send(self.num_blocks)
        ready = self._await_all(Ready, None)
        self.backends = ready[0].backends
        self.collectives = self.collectives or _joined_words(rank.collectives for rank in ready)

    def _accept_all(self, listener: ChannelListener, world: int) -> list[Hello]:
        hellos: list[Hello] = []
        while len(hellos) < world:
            channel = listener.accept(timeout_s=0.2)
            if channel is not None:
                hello = channel.receive(timeout_s=30.0)
                self._channels[hello.rank] = channel
                self._selector.register(channel, selectors.EVENT_READ, hello.rank)
                hellos.append(hello)
                continue
            reason = self._launcher.exit_reason()
            if reason:
                raise EngineDeadError(f"a rank ended before it was ready: {reason}")
            if time.monotonic() > self._deadline:
                missing = sorted(set(range(world)) - set(self._channels))
                raise ResourceError(
                    f"ranks {missing} did not start within {self._config.start_timeout_s:g} s"
                )
        return sorted(hellos, key=lambda hello: hello.rank)

    def _introduce(self, hellos: list[Hello]) -> None:
        """Tells every rank where the rendezvous is, who shares its host and card, and how collectives travel."""
        self.ranks = tuple(RankPlace(hello.rank, hello.host_name, hello.pid, hello.card) for hello in hellos)
        on_host = Counter(hello.host_id for hello in hellos)
        use = use_of_cards([hello.card for hello in hellos], self._config)
        self.collectives = use.collectives
        store_port = hellos[0].store_port
        assert store_port is not None
        for hello, ranks_on_card, free in zip(hellos, use.ranks_on_card, use.free_bytes, strict=True):
            at = (hellos[0].host, store_port)
            start = Start(at, on_host[hello.host_id], ranks_on_card, free, use.over_host)
            self._channels[hello.rank].send(start)

    def _await_all(self, kind: type, progress: Progress | None) -> list[Any]:
        """Waits until every rank has said a `kind`, passing on how far loading has come."""
        loading: dict[int, Loading] = {}
        said: dict[int, Any] = {}
        with self._losing_ranks():
            while len(said) < len(self._channels):
                rank, message = self._next_message(self._deadline)
                if isinstance(message, Loading):
                    loading[rank] = message
                    if progress and len(loading) == len(self._channels):
                        progress(
                            sum(m.done_bytes for m in loading.values()),
                            sum(m.total_bytes for m in loading.values()),
                        )
                else:
                    assert isinstance(message, kind), message
                    said[rank] = message
        return list(said.values())

    def _next_message(self, deadline: float) -> tuple[int, Any]:
        """The next message of any rank. Raises _LossError when one has failed, ended or gone silent."""
        events = self._selector.select(max(0.0, deadline - time.monotonic()))
        if not events:
            raise _LossError(EngineDeadError("the ranks did not answer in time"), _Blame.UNKNOWN)
        rank = events[0][0].data
        channel = self._channels[rank]
        try:
            message = channel.receive(timeout_s=30.0)
        except (EOFError, TimeoutError):
            self._selector.unregister(channel)
            reason = self._launcher.exit_reason() or "its process ended"
            raise _LossError(EngineDeadError(f"rank {rank} died: {reason}"), _Blame.OWN) from None
        if isinstance(message, Failed):
            self._selector.unregister(channel)
            _log.error("rank %d failed:\n%s", rank, message.details)
            raise _LossError(message.error, _blame(message.error))
        return rank, message

    @contextlib.contextmanager
    def _losing_ranks(self) -> Iterator[None]:
        """Turns the loss of a rank into the end of the group, told by its root cause."""
        try:
            yield
        except EOFError as error:
            self._die(self._root_cause(_LossError(EngineDeadError(f"a rank died: {error}"), _Blame.UNKNOWN)))
        except _LossError as loss:
            self._die(self._root_cause(loss))

    def _root_cause(self, first: _LossError) -> QwenDistError:
        """When one rank fails the others fail for want of it: hears them out to find the one to blame."""
        losses, deadline = [first], time.monotonic() + _ROOT_CAUSE_WAIT_S
        while (
            all(loss.blame is not _Blame.OWN for loss in losses)
            and self._selector.get_map()
            and time.monotonic() < deadline
        ):
            try:
                self._next_message(deadline)
            except _LossError as loss:
                losses.append(loss)
        return min(losses, key=lambda loss: loss.blame).error

    def _die(self, error: QwenDistError) -> NoReturn:
        """Ends the whole group: a step that lost a rank cannot be repeated on the others."""
        self._death = error
        _log.error("the engine stops: %s", error)
        self.shutdown()
        raise error

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(str(self._death))

    def _await_ends(self, deadline: float) -> None:
        """Waits until every rank has closed its channel, or the deadline."""
        while self._selector.get_map() and time.monotonic() < deadline:
            for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
                try:
                    self._channels[key.data].receive(timeout_s=1.0)
                except (EOFError, TimeoutError):
                    self._selector.unregister(key.fileobj)


def _joined_words(said: Iterable[str]) -> str:
    """What ranks say of themselves, each thing once."""
    return " and ".join(dict.fromkeys(said))


class _Blame(IntEnum):
    """How sure it is that a lost rank is the cause rather than a victim, surest first."""

    OWN = 0
    PROBABLE = 1
    VICTIM = 2
    UNKNOWN = 3


def _blame(error: QwenDistError) -> _Blame:
    if isinstance(error, PeerLostError):
        return _Blame.VICTIM
    if isinstance(error, EngineDeadError):
        return _Blame.PROBABLE  # any exception; the collectives' own look like this when a peer dies
    return _Blame.OWN


class _LossError(Exception):
    """A rank is lost: with what error, and how much that error explains."""

    def __init__(self, error: QwenDistError, blame: _Blame) -> None:
        super().__init__(str(error))
        self.error = error
        self.blame = blame
