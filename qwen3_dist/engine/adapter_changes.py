"""Changes the LoRA adapters of a running engine.

Every rank reads the adapters that are new in a thread while steps go on, beside those that it has. When all ranks have
them, no more steps are planned, and all ranks switch once none is in flight. If one rank cannot read them, all drop
theirs and everything stays as it is. Adapters have numbers in plans by their places on the ranks, so unfinished
sequences get other numbers with the switch. An adapter that is removed takes no more requests; its weights stay behind
the others until the last sequence that uses it has ended. The rank's side is `worker/adapter_change.py`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from qwen3_dist.engine.rank_work import RankWork
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.errors import QwenDistError, ResourceError
from qwen3_dist.launch.base import Executor
from qwen3_dist.lora_adapters import LoraAdapters, NextAdapters
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)

Done = Callable[[LoraAdapters | QwenDistError], None]


class AdapterChanges:
    """The adapters of an engine's ranks. Called between steps.

    `unfinished` returns the sequences that run or wait. `adopt` is told the engine's adapters before the ranks switch
    to them, so that a rank that starts later loads the same. Ranks may read for `start_timeout_s`.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        unfinished: Callable[[], Iterable[Sequence]],
        adopt: Callable[[LoraAdapters], None],
    ) -> None:
        self._executor, self._unfinished, self._adopt = executor, unfinished, adopt
        self._timeout_s = config.start_timeout_s
        self._asked: deque[tuple[LoraAdapters, Done]] = deque()
        self.restart(config.lora)

    def restart(self, adapters: LoraAdapters) -> None:
        """Tells that the ranks have `adapters` alone, that no sequence is left, and that what was going on will not be
        finished."""
        self._adapters = adapters
        self._held = [*zip(adapters.names, adapters.digests, strict=True)]  # by place
        self._asked.clear()
        self._next: NextAdapters | None = None  # which the ranks read
        self._keeps_unused = False  # since the last change, as they could not be dropped
        self.is_ready = False  # whether all ranks have read them, so that no more steps are to be planned
        self._reading: RankWork | None = None

    @property
    def names(self) -> list[str]:
        """The name of each number in plans, from 1. May be called from any thread."""
        return [name for name, _ in self._held]

    @property
    def is_busy(self) -> bool:
        """Whether adapters change, so that `tick` must be called even if no step runs."""
        return bool(self._asked) or self._has_unused

    def begin(self, adapters: LoraAdapters, done: Done) -> None:
        """Makes `tick` give all ranks `adapters`, which have digests. `done` gets them, or the error of a rank that
        cannot load them; then all ranks have what they had."""
        self._asked.append((adapters, done))

    @property
    def are_read(self) -> bool:
        """Whether ranks read adapters, or have read those to which they have not switched yet."""
        return self._next is not None

    def tick(self, idle: bool, waits: bool = False) -> None:
        """Continues changes. `idle`: no step is in flight. Never waits for ranks that read. `waits`: ranks read
        experts of a layer with their adapters."""
        if waits:
            return
        if self._has_unused and not self._asked:
            self.begin(self._adapters, self._after_drop)
        if not self._asked:
            return
        if self._next is None:
            self._prepare(self._asked[0][0])
        elif not self.is_ready:
            self._poll()
        elif idle:
            self._switch(self._next)

    @property
    def _has_unused(self) -> bool:
        """Whether ranks hold adapters that were removed and that no sequence uses any more."""
        current = len(self._adapters.pairs)
        leaving = len(self._held) - current
        if leaving == 0 or self._keeps_unused:
            return False
        return len({number for number in self._used() if number > current}) < leaving

    def _used(self) -> set[int]:
        return {sequence.adapter for sequence in self._unfinished()} - {0}

    def _prepare(self, adapters: LoraAdapters) -> None:
        held = {digest: place for place, (_, digest) in enumerate(self._held)}
        kept = tuple(held.get(digest) for digest in adapters.digests)
        leaving = tuple(number - 1 for number in sorted(self._used()) if number - 1 not in kept)
        self._next = NextAdapters(adapters, kept, leaving)
        self._executor.call("prepare_adapters", self._next)
        self._reading = RankWork(self._executor, "adapters_arrived", self._timeout_s, self._too_late)

    def _poll(self) -> None:
        """Asks the ranks whether they have read everything. Has them drop it if one could not."""
        assert self._reading is not None
        arrived = self._reading.poll()
        if not isinstance(arrived, QwenDistError):
            self.is_ready = arrived
            return
        self._executor.call("drop_adapters")
        self._end(arrived)

    def _too_late(self, ranks: str) -> QwenDistError:
        return ResourceError(
            f"{ranks} did not load the LoRA adapters within {self._timeout_s:g} s; the engine goes on with those that "
            "it had"
        )

    def _switch(self, to: NextAdapters) -> None:
        """Makes the ranks switch, unless a sequence uses an adapter that it did not when the ranks began to read."""
        places = [*to.kept, *to.leaving]
        numbers = {place + 1: number for number, place in enumerate(places, 1) if place is not None}
        if not self._used() <= numbers.keys():
            self.is_ready = False
            self._prepare(to.adapters)
            return
        self._adopt(to.adapters)
        current = zip(to.adapters.names, to.adapters.digests, strict=True)
        self._adapters, self._held = to.adapters, [*current, *(self._held[place] for place in to.leaving)]
        self._keeps_unused = False
        for sequence in self._unfinished():
            sequence.adapter = numbers.get(sequence.adapter, 0)
        self._executor.call("use_adapters")
        self._end(to.adapters)

    def _end(self, outcome: LoraAdapters | QwenDistError) -> None:
        self._next, self.is_ready = None, False
        self._asked.popleft()[1](outcome)

    def _after_drop(self, outcome: LoraAdapters | QwenDistError) -> None:
        if isinstance(outcome, QwenDistError):
            self._keeps_unused = True
            _log.warning("adapters that are no longer used stay in memory: %s", outcome)
