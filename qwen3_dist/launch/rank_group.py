"""The executor for ranks in other processes. It starts them together, drives them and notices when one ends.

A `Launcher` (`processes.py`, `ray_ranks.py`) starts and ends the processes. Everything else, from rendezvous to steps,
is here and does not depend on the launcher.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.expert_placement import Placements
from qwen3_dist.launch.arrivals import Arrivals
from qwen3_dist.launch.base import Executor, Grouping, RankPlace, names
from qwen3_dist.launch.card_use import use_of_cards
from qwen3_dist.launch.connections import Blame, RankConnections, RankLostError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.rank_watch import RankWatch
from qwen3_dist.protocol.channel import pack
from qwen3_dist.protocol.messages import (
    Answer,
    Call,
    Downloading,
    Hello,
    Loaded,
    Loading,
    Progress,
    Ready,
    Rejoin,
    Start,
)
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_STOP_WAIT_S = 3.0
_REJOIN_S = 15.0  # for a rank to leave its step and its groups


class RankGroupExecutor(Executor):
    """Drives the ranks that `launcher` starts. The constructor returns when all are ready for plans."""

    def __init__(
        self,
        config: EngineConfig,
        launcher: Launcher,
        placements: Placements | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Without `placements` experts are placed evenly."""
        self._config = config
        self._launcher = launcher
        self._seats = {rank: rank for rank in range(config.layout.world)}
        self._attempt = 0  # to make the ranks meet
        self._invited: Arrivals | None = None
        self._deadline = time.monotonic() + config.start_timeout_s
        self._ranks = RankConnections(lambda: launcher.exit_reason(self._seats))
        self._watch = RankWatch(config.watchdog_s(launcher.device))
        self._submitted: deque[Sequence[StepPlan]] = deque()
        self._results: list[deque[StepResult]] = [deque() for _ in range(config.layout.dp)]
        self._death: QwenDistError | None = None
        self._lost: frozenset[int] = frozenset()  # seats
        self.device = launcher.device
        self.depth = config.layout.pp if config.layout.pp > 1 else 2 if config.overlap else 1
        try:
            self._start(Grouping(config, placements or {}, tuple(self._seats)), progress)
        except BaseException:
            self.shutdown()
            raise

    def submit(self, plans: Sequence[StepPlan]) -> None:
        self._raise_if_dead()
        packed = [pack(plan) for plan in plans]
        for rank in self._ranks.ranks:
            self._ranks.post(rank, packed[self._config.layout.coords(rank).group])
        self._submitted.append(plans)

    def collect(self, limit_s: float | None = None) -> list[StepResult | None]:
        self._raise_if_dead()
        self._watch.begin(limit_s)
        plans = self._submitted.popleft()
        deadline = time.monotonic() + self._config.step_timeout_s
        answering = [bool(plan.sequences) for plan in plans]

        def awaited() -> str:
            layout = self._config.layout
            last_stage = range(layout.world - layout.stage_size, layout.world)
            answerers = last_stage[:: layout.tp]  # tp rank 0 of each dp group
            late = [
                rank for group, rank in enumerate(answerers) if answering[group] and not self._results[group]
            ]
            return self._late(late, f"answer step {plans[0].step}")

        with self._losing_ranks():
            while not all(map(bool, itertools.compress(self._results, answering))):
                self._keep_result(*self._ranks.next_message(deadline, awaited, self._watch))
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

        def awaited() -> str:
            return self._late(self._ranks.ranks - answers.keys(), f"answer {method}")

        self._watch.begin(limit_s=None)
        self._ranks.post_all(Call(method, arguments))
        with self._losing_ranks():
            while len(answers) < len(self._ranks.ranks):
                rank, message = self._ranks.next_message(deadline, awaited, self._watch)
                if isinstance(message, Answer):
                    answers[rank] = message.value
                else:
                    self._keep_result(rank, message)  # the result of a step submitted before
        return [answers[rank] for rank in sorted(answers)]

    def check(self) -> None:
        self._raise_if_dead()
        if not self._ranks.is_silent():
            with self._losing_ranks():
                rank, message = self._ranks.next_message(time.monotonic() + 1.0, lambda: "")
            raise AssertionError(f"rank {rank} sent {message!r} unasked")

    def shutdown(self) -> None:
        if self._death is None:
            self._death = EngineDeadError("the engine was shut down")
            self._ranks.post_all(None)
            self._ranks.await_ends(_STOP_WAIT_S)
        if self._invited is not None:
            self._invited.close()
        self._launcher.stop()
        self._ranks.close()
        self._watch.close()

    def _keep_result(self, rank: int, message: Any) -> None:
        assert isinstance(message, StepResult), message
        self._results[self._config.layout.coords(rank).group].append(message)

    def _late(self, ranks: Iterable[int], what: str) -> str:
        return f"{names(list(ranks))} did not {what} within {self._config.step_timeout_s:g} s"

    @property
    def lost_seats(self) -> frozenset[int]:
        return self._lost

    def regroup(self, to: Grouping, wait_s: float) -> int:
        self._keep_ranks_of(to)
        self._attempt += 1
        self._death, self._lost = None, frozenset()
        self._deadline = time.monotonic() + self._config.start_timeout_s
        try:
            self._watch.abort_collectives()
            for rank in self._ranks.ranks:
                self._ranks.post(rank, pack(Rejoin(rank, to.config, to.placements, self._attempt)))
            arrivals = self._new_ranks_of(to, wait_s)
            with contextlib.closing(arrivals):
                kept = [self._await_hello(rank) for rank in self._ranks.ranks]
                there = False
                while not there:
                    self.check()
                    with self._losing(arrivals):
                        there = arrivals.poll(0.2)
                new = arrivals.hand_over(self._ranks, self._watch)
            return self._meet([*kept, *new], progress=None)
        except QwenDistError as error:
            self._death = error
            raise

    def invite(self, to: Grouping, wait_s: float) -> None:
        seats = {rank: seat for rank, seat in enumerate(to.seats) if seat not in self._seats.values()}
        self._attempt += 1
        self._invited = Arrivals(self._launcher, to, seats, wait_s, self._attempt)
        self._invited.launch()

    def arrived(self) -> bool:
        return self._invited is not None and self._invited.poll(0.0)

    @property
    def missing_seats(self) -> frozenset[int]:
        return self._invited.missing_seats if self._invited is not None else frozenset()

    def dismiss(self) -> None:
        invited, self._invited = self._invited, None
        if invited is not None:
            invited.end()

    def _keep_ranks_of(self, to: Grouping) -> None:
        """Lets go of the ranks that were lost or have no seat in `to`, and numbers the others as `to` does."""
        ranks = {seat: rank for rank, seat in enumerate(to.seats)}
        staying = ranks.keys() - self._lost
        connected = {*self._ranks.ranks}
        kept = {rank: ranks[self._seats[rank]] for rank in connected if self._seats[rank] in staying}
        for rank in connected - kept.keys():
            self._ranks.drop(rank)
            self._watch.drop(rank)
        self._launcher.end([seat for seat in self._seats.values() if seat not in ranks])
        self._ranks.renumber(kept)
        self._watch.renumber(kept)
        self._config, self._seats = to.config, dict(enumerate(to.seats))
        self._submitted.clear()
        self._results = [deque() for _ in range(to.config.layout.dp)]

    def _new_ranks_of(self, to: Grouping, wait_s: float) -> Arrivals:
        """The ranks of `to` that were not kept: those that were invited, or else others, which are launched."""
        seats = {rank: seat for rank, seat in self._seats.items() if rank not in self._ranks.ranks}
        invited, self._invited = self._invited, None
        if invited is not None and invited.are(to, seats):
            return invited
        if invited is not None:
            invited.end()
        arrivals = Arrivals(self._launcher, to, seats, wait_s, self._attempt)
        with self._losing(arrivals):
            arrivals.launch()
        return arrivals

    @contextlib.contextmanager
    def _losing(self, arrivals: Arrivals) -> Iterator[None]:
        try:
            yield
        except QwenDistError:
            self._lost = arrivals.missing_seats
            arrivals.close()
            raise

    def _await_hello(self, rank: int) -> Hello:
        try:
            return self._ranks.await_hello(rank, self._attempt, _REJOIN_S)
        except QwenDistError:
            self._lost = frozenset([self._seats[rank]])
            raise

    def _start(self, to: Grouping, progress: Progress | None) -> None:
        arrivals = Arrivals(self._launcher, to, self._seats, self._config.start_timeout_s)
        with contextlib.closing(arrivals):
            self._launcher.launch(arrivals.specs())
            while not arrivals.poll(0.2):
                pass
            hellos = arrivals.hand_over(self._ranks, self._watch)
        self._meet(hellos, progress)

    def _meet(self, hellos: list[Hello], progress: Progress | None) -> int:
        """Makes the ranks join their groups, load what they have not, and become ready. Returns the bytes that they
        read."""
        self._introduce(sorted(hellos, key=lambda hello: hello.rank))
        loading: dict[int, Loading] = {}
        fitting = self._await_all(Loaded, "load its part of the model", loading, progress)
        self.num_blocks = min(loaded.num_blocks for loaded in fitting)
        self._ranks.post_all(self.num_blocks)
        ready = self._await_all(Ready, "become ready", loading)
        self.ranks = tuple(
            replace(place, memory_bytes=each.memory_bytes)
            for place, each in zip(self.ranks, ready, strict=True)
        )
        self.backends = ready[0].backends
        self.may_repeat = any(rank.may_repeat for rank in ready)
        self.collectives = self.collectives or _joined_words(rank.collectives for rank in ready)
        return sum(each.done_bytes for each in loading.values())

    def _introduce(self, hellos: list[Hello]) -> None:
        """Sends Start to every rank: the rendezvous address, who shares its host and card, how collectives travel."""
        self.ranks = tuple(RankPlace(hello.rank, hello.host_name, hello.pid, hello.card) for hello in hellos)
        on_host = Counter(hello.host_id for hello in hellos)
        use = use_of_cards([hello.card for hello in hellos], self._config)
        self.collectives = use.collectives
        store_port = hellos[0].store_port
        assert store_port is not None
        for hello, ranks_on_card, free in zip(hellos, use.ranks_on_card, use.free_bytes, strict=True):
            at = (hellos[0].host, store_port)
            start = Start(at, on_host[hello.host_id], ranks_on_card, free, use.over_host)
            self._ranks.post(hello.rank, pack(start))

    def _await_all(
        self, kind: type, what: str, loading: dict[int, Loading], progress: Progress | None = None
    ) -> list[Any]:
        """Waits for a message of type `kind` from every rank, anew after each progress that one makes. Keeps how far
        `loading` is, and reports it."""
        said: dict[int, Any] = {}

        def awaited() -> str:
            missing = names(self._ranks.ranks - said.keys())
            return f"{missing} did not {what} within start_timeout_s={self._config.start_timeout_s:g}"

        with self._losing_ranks():
            while len(said) < len(self._ranks.ranks):
                rank, message = self._ranks.next_message(self._deadline, awaited)
                if isinstance(message, Downloading | Loading):
                    self._deadline = time.monotonic() + self._config.start_timeout_s
                if isinstance(message, Loading):
                    loading[rank] = message
                    if progress and len(loading) == len(self._ranks.ranks):
                        progress(
                            sum(m.done_bytes for m in loading.values()),
                            sum(m.total_bytes for m in loading.values()),
                        )
                elif not isinstance(message, Downloading):
                    assert isinstance(message, kind), message
                    said[rank] = message
        return [said[rank] for rank in sorted(said)]

    @contextlib.contextmanager
    def _losing_ranks(self) -> Iterator[None]:
        """A context in which the loss of a rank stops the whole group, with the root cause as the error: the other
        ranks cannot finish a step without the lost one. They end, unless they are kept for `regroup`."""
        try:
            with self._ranks.reporting_root_cause():
                yield
        except RankLostError as loss:
            self._death = loss.error
            known = loss.ranks if loss.blame <= Blame.PROBABLE else ()
            self._lost = frozenset(self._seats[rank] for rank in known)
            _log.error("the engine %s: %s", "lost a rank" if self.keeps_ranks else "stops", loss.error)
            if not self.keeps_ranks:
                self.shutdown()
            raise loss.error from None

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(str(self._death))


def _joined_words(said: Iterable[str]) -> str:
    """The distinct descriptions that ranks gave, in one line."""
    return " and ".join(dict.fromkeys(said))
