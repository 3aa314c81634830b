"""One simulated replica: dp groups that step together, each step as long as its slowest group.

The replica plans stretches of equal decode steps ahead: `next_event_s` is the end of the first step after which
something can change. If a request arrives earlier, only the steps that have ended by then are executed, so the result
is the same as going one step at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from cluster.simulation.arrivals import Request
from cluster.simulation.group import DecodeRun, Group, SimulatedSequence, make_sequence
from cluster.simulation.recorder import Recorder
from cluster.simulation.step_times import StepTimes
from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.scheduler_counts import SchedulerCounts
from qwen3_dist.errors import ConfigError
from qwen3_dist.protocol.step_limits import SchedulerLimits

_MAX_LOOKAHEAD = 64  # steps; a longer stretch is usually interrupted by an arrival


@dataclass(frozen=True)
class ReplicaConfig:
    """Configuration of a replica with `groups` dp groups; `num_blocks` and `limits` are per group.

    `depth` is the number of steps in flight (`Executor.depth`): 2 if scheduling overlaps with the ranks' work.
    `num_devices` is the replica's world. `fast_forward=False` simulates every step singly (for tests).
    """

    num_blocks: int
    limits: SchedulerLimits
    block_size: int = 16
    prefix_caching: bool = True
    groups: int = 1
    depth: int = 2
    num_devices: int = 1
    max_model_len: int = 1 << 30
    fast_forward: bool = True

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "groups", "depth", "num_devices", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def longest(self) -> int:
        """Most tokens of one sequence, prompt and output."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


@dataclass(frozen=True)
class _DecodeStretch:
    """Equal decode steps: step `i` takes `seconds[i]` and ends at `ends[i]`; the step before the first ended at
    `start_s`.

    All but the last can be skipped; after the last, sequences may finish or be admitted.
    """

    start_s: float
    ends: list[float]
    seconds: list[float]
    num_decodes: int


class Replica:
    """A replica. The service calls `finish_step` and `proceed` at each `next_event_s`."""

    def __init__(self, index: int, config: ReplicaConfig, times: StepTimes, recorder: Recorder) -> None:
        self.index = index
        self.ongoing = 0  # number of its requests
        self.next_event_s: float | None = None  # None: nothing to do
        self.version = 0  # increases with each change of `next_event_s`
        self.steps = 0
        self._config = config
        self._times = times
        self._recorder = recorder
        self.groups = [
            Group(
                BlockManager(config.num_blocks, config.block_size, config.prefix_caching),
                config.limits,
                config.fast_forward,
            )
            for _ in range(config.groups)
        ]
        self._durations: deque[float] = deque()  # of the steps in flight, oldest first
        self._inbox: list[Request] = []
        self._step_end_s = 0.0  # of the oldest step in flight
        self._stretch: _DecodeStretch | None = None
        self._next_seq_id = 0

    def counts(self) -> list[SchedulerCounts]:
        return [group.scheduler.counts for group in self.groups]

    def submit(self, request: Request, now_s: float) -> None:
        """Adds a request, which is passed to the scheduler when the step in progress ends."""
        self.ongoing += 1
        self._inbox.append(request)
        if self._stretch is not None:
            self._apply_stretch(bisect_left(self._stretch.ends, now_s))
            self._set_next_event(self._step_end_s)
        elif not self._durations:
            self.proceed(now_s)

    def finish_step(self, now_s: float) -> int:
        """Ends the step that ends at `next_event_s`. Returns the number of requests that finished."""
        if self._stretch is not None:
            self._apply_stretch(len(self._stretch.ends) - 1)
        self._durations.popleft()
        self.steps += 1
        finished = 0
        for group in self.groups:
            for sequence in group.collect():
                self._recorder.token(sequence, now_s)
                finished += sequence.finish_reason is not None
        self.ongoing -= finished
        return finished

    def proceed(self, now_s: float) -> None:
        """Passes new requests to the schedulers and starts the next step, if there is work."""
        for request in self._inbox:
            sequence = make_sequence(
                self._next_seq_id, request, self._config.block_size, self._config.longest
            )
            self._group_for(sequence).scheduler.add(sequence)
            self._next_seq_id += 1
        self._inbox.clear()
        while len(self._durations) < self._config.depth and self._plan_step():
            pass
        if not self._durations:
            self.next_event_s = None
            self.version += 1
            return
        self._step_end_s = now_s + self._durations[0]
        self._stretch = self._find_stretch(now_s) if self._config.fast_forward else None
        self._set_next_event(self._stretch.ends[-1] if self._stretch else self._step_end_s)

    def _group_for(self, sequence: SimulatedSequence) -> Group:
        """The dp group for a new sequence, chosen as in `Engine.add_request`."""
        if len(self.groups) == 1:
            return self.groups[0]
        return min(self.groups, key=lambda group: group.scheduler.tokens_ahead(sequence))

    def _plan_step(self) -> bool:
        shapes = [shape for group in self.groups if (shape := group.plan()) is not None]
        if not shapes:
            for group in self.groups:
                group.cancel_plan()
            return False
        self._durations.append(self._times.together(shapes, len(self.groups)))
        return True

    def _set_next_event(self, time_s: float) -> None:
        self.next_event_s = time_s
        self.version += 1

    def _find_stretch(self, now_s: float) -> _DecodeStretch | None:
        runs: list[DecodeRun] = []
        cycles = _MAX_LOOKAHEAD
        for group in self.groups:
            run = group.decode_run()
            if run is None or run.cycles < 1:
                return None
            cycles = min(cycles, run.cycles)
            if run.num_decodes:
                runs.append(run)
        seconds = self._run_seconds(runs, cycles + self._config.depth)
        ends = list(accumulate(seconds[1 : cycles + 1], initial=self._step_end_s))
        return _DecodeStretch(now_s, ends, seconds, sum(run.num_decodes for run in runs))

    def _run_seconds(self, runs: list[DecodeRun], count: int) -> list[float]:
        """Seconds of each of the next `count` steps, starting with the oldest in flight."""
        slowest: list[float] = []
        for run in runs:
            seconds = []
            batch, context, end = run.num_decodes, run.context_tokens, 0
            for _ in range(count):
                if context >= end:
                    line = self._times.decode_line(batch, context)
                    base, slope, end = line
                seconds.append(base + slope * context)
                context += batch
            slowest = list(map(max, slowest, seconds)) if slowest else seconds
        return slowest

    def _apply_stretch(self, cycles: int) -> None:
        """Executes the first `cycles` cycles of the stretch and drops the rest."""
        stretch = self._stretch
        assert stretch is not None
        self._stretch = None
        if cycles == 0:
            return
        for group in self.groups:
            group.skip(cycles, stretch.ends[cycles - 1])
        self.steps += cycles
        self._recorder.decodes(stretch.start_s, stretch.ends[:cycles], stretch.num_decodes)
        self._durations = deque(stretch.seconds[cycles : cycles + self._config.depth])
        self._step_end_s = stretch.ends[cycles]
