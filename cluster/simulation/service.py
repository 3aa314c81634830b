"""The simulated service: it routes requests to replicas, and starts and stops replicas with the load.

The replica with the fewest ongoing requests gets a request, which then waits in that replica's engine.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from cluster.simulation.arrivals import ClosedLoop, Request
from cluster.simulation.autoscaler import Autoscaler, AutoscalingConfig, MeanLoad
from cluster.simulation.recorder import Recorder
from cluster.simulation.replica import Replica, ReplicaConfig
from cluster.simulation.step_times import StepCost, StepTimes
from qwen3_dist.engine.scheduler_counts import SchedulerCounts
from qwen3_dist.errors import ConfigError


@dataclass(frozen=True)
class ServiceSimulation:
    """A service to simulate.

    `start_up_s` is the time from the decision to add a replica until it accepts requests. `max_devices` limits the
    devices that all replicas hold at once, starting and draining ones included. `request_overhead_s`, and
    `request_token_overhead_s` for each token of the prompt, are added to the time to first token of each request; in a
    closed loop they are also the mean time between an answer and the client's next request.
    """

    replica: ReplicaConfig
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    start_up_s: float = 60.0
    max_devices: int | None = None
    seed: int = 0
    request_overhead_s: float = 0.0
    request_token_overhead_s: float = 0.0

    def outside_s(self, input_len: int) -> float:
        """Seconds of a request's time to first token that pass outside the engine."""
        return self.request_overhead_s + self.request_token_overhead_s * input_len

    def __post_init__(self) -> None:
        if not self.start_up_s >= 0:
            raise ConfigError(f"start_up_s must not be negative, not {self.start_up_s:g}")
        most = self.autoscaling.max_replicas * self.replica.num_devices
        if self.max_devices is not None and most > self.max_devices:
            raise ConfigError(
                f"max_replicas={self.autoscaling.max_replicas} of {self.replica.num_devices} devices each need "
                f"{most} and there are {self.max_devices}; "
                f"max_replicas={self.max_devices // self.replica.num_devices} is the most"
            )


@dataclass(frozen=True)
class ReplicaCount:
    """The numbers of replicas from `time_s` on."""

    time_s: float
    running: int
    starting: int
    draining: int

    @property
    def total(self) -> int:
        return self.running + self.starting + self.draining


@dataclass
class Outcome:
    """The raw result of a simulation; `report.summarize` makes figures of it."""

    simulation: ServiceSimulation
    recorder: Recorder
    replica_counts: list[ReplicaCount]
    counts: SchedulerCounts  # of all schedulers together
    end_s: float = 0.0  # when the last request finished
    refused: int = 0  # requests whose prompt fills the cache or the context
    steps: int = 0  # of all replicas, skipped ones included
    events: int = 0  # arrivals, steps or stretches, load measurements, replicas that became ready
    wall_s: float = 0.0


class _Kind(IntEnum):
    """Kinds of events. At equal times the lower one comes first, and arrivals come before all of them."""

    ARRIVAL = 0  # of a client's next request, in a closed loop
    READY = 1
    LOAD = 2
    STEP = 3


def simulate(simulation: ServiceSimulation, cost: StepCost, requests: Iterable[Request]) -> Outcome:
    """Simulates `requests`, which are in order of arrival, until the last has finished."""
    service = _Service(simulation, StepTimes(cost))
    started = time.perf_counter()
    outcome = service.run(requests)
    outcome.wall_s = time.perf_counter() - started
    return outcome


class _Service:
    def __init__(self, simulation: ServiceSimulation, times: StepTimes) -> None:
        self._simulation = simulation
        self._times = times
        self._rng = random.Random(simulation.seed)
        self._recorder = Recorder()
        self._outcome = Outcome(simulation, self._recorder, [], SchedulerCounts())
        self._events: list[tuple[float, int, int, int]] = []  # (time, kind, replica, version)
        self._replicas: dict[int, Replica] = {}  # all replicas that hold devices
        self._running: list[Replica] = []
        self._starting: list[Replica] = []
        self._ongoing = 0  # requests in replicas
        self._next_index = 0
        self._sent: dict[int, Request] = {}  # by clients of a closed loop, and not at a replica yet
        self._next_sent = 0
        self._loop: ClosedLoop | None = None
        self._turnarounds = random.Random(simulation.seed)
        config = simulation.autoscaling
        self._autoscaler = Autoscaler(config)
        self._load = MeanLoad(config.look_back_period_s)
        for _ in range(config.min_replicas):
            self._running.append(self._new_replica())
        self._note_replicas(0.0)

    def run(self, requests: Iterable[Request]) -> Outcome:
        outcome, events = self._outcome, self._events
        if not self._simulation.autoscaling.is_fixed:
            self._push(self._simulation.autoscaling.metrics_interval_s, _Kind.LOAD)
        arrivals = iter(requests)
        self._loop = loop = requests if isinstance(requests, ClosedLoop) else None
        request = next(arrivals, None)
        now_s = 0.0
        while request is not None or self._ongoing or self._sent:
            if request is not None and (not events or request.arrival_s <= events[0][0]):
                outcome.events += 1
                self._arrive(request)
                request = next(arrivals, None)
                continue
            now_s, kind, index, version = heapq.heappop(events)
            if kind == _Kind.STEP:
                replica = self._replicas.get(index)
                if replica is None or replica.version != version:
                    continue  # replaced by a later event of this replica
                finished = self._step(replica, now_s)
                for follower in loop.after(now_s, finished) if loop and finished else ():
                    self._send(follower)
            elif kind == _Kind.ARRIVAL:
                self._arrive(self._sent.pop(index))
            elif kind == _Kind.READY:
                self._ready(index, now_s)
            else:
                self._rescale(now_s)
                self._push(now_s + self._simulation.autoscaling.metrics_interval_s, _Kind.LOAD)
            outcome.events += 1
        outcome.end_s = max(self._recorder.last_tokens_s, default=0.0)
        for replica in list(self._replicas.values()):
            self._tally(replica)
        return outcome

    def _send(self, request: Request) -> None:
        """Has `request` arrive after the overhead of a request, which is random with the given mean: the last answer
        reaches the client, and its next request the replica."""
        late_s = self._turnarounds.uniform(0, 2 * self._simulation.outside_s(request.input_len))
        request = replace(request, arrival_s=request.arrival_s + late_s)
        self._sent[self._next_sent] = request
        self._push(request.arrival_s, _Kind.ARRIVAL, self._next_sent)
        self._next_sent += 1

    def _arrive(self, request: Request) -> None:
        if request.input_len >= self._simulation.replica.longest:
            self._outcome.refused += 1
            for follower in self._loop.after(request.arrival_s, 1) if self._loop else ():
                self._send(follower)
            return
        self._change_ongoing(1, request.arrival_s)
        replica = self._route()
        replica.submit(request, request.arrival_s)
        self._await_step(replica)

    def _route(self) -> Replica:
        """Chooses the replica with the fewest requests, at random among equals."""
        fewest = min(replica.ongoing for replica in self._running)
        return self._rng.choice([replica for replica in self._running if replica.ongoing == fewest])

    def _step(self, replica: Replica, now_s: float) -> int:
        """Ends a step of `replica`, and starts its next. Returns the number of requests that finished."""
        finished = replica.finish_step(now_s)
        if finished:
            self._change_ongoing(-finished, now_s)
        replica.proceed(now_s)
        self._await_step(replica)
        if replica.next_event_s is None and replica not in self._running:
            self._remove(replica)
            self._reconcile(now_s)
        return finished

    def _ready(self, index: int, now_s: float) -> None:
        replica = self._replicas.get(index)
        if replica is None:
            return  # it was stopped while starting
        self._starting.remove(replica)
        self._running.append(replica)
        self._note_replicas(now_s)

    def _rescale(self, now_s: float) -> None:
        self._autoscaler.decide(now_s, len(self._running), self._load.mean(now_s))
        self._reconcile(now_s)

    def _reconcile(self, now_s: float) -> None:
        """Starts or stops replicas until there are as many as the autoscaler wants and devices allow.

        As in Serve, replicas that are still starting are stopped first, then the newest running ones, which drain.
        """
        alive = len(self._running) + len(self._starting)
        while alive > self._autoscaler.target:
            if self._starting:
                self._remove(self._starting.pop())
            else:
                replica = self._running.pop()
                if replica.next_event_s is None:
                    self._remove(replica)
            alive -= 1
        devices, most = self._simulation.replica.num_devices, self._simulation.max_devices
        while alive < self._autoscaler.target:
            if most is not None and (len(self._replicas) + 1) * devices > most:
                break  # until a draining replica is gone
            replica = self._new_replica()
            self._starting.append(replica)
            self._push(now_s + self._simulation.start_up_s, _Kind.READY, replica.index)
            alive += 1
        self._note_replicas(now_s)

    def _new_replica(self) -> Replica:
        replica = Replica(self._next_index, self._simulation.replica, self._times, self._recorder)
        self._next_index += 1
        self._replicas[replica.index] = replica
        return replica

    def _remove(self, replica: Replica) -> None:
        del self._replicas[replica.index]
        self._tally(replica)

    def _tally(self, replica: Replica) -> None:
        """Adds the counts of a replica to the outcome. All its blocks must be free."""
        total = self._outcome.counts
        for group in replica.groups:
            assert group.scheduler.blocks.num_free == group.scheduler.blocks.num_blocks, "blocks were lost"
        for counts in replica.counts():
            for name, value in vars(counts).items():
                setattr(total, name, getattr(total, name) + value)
        self._outcome.steps += replica.steps

    def _change_ongoing(self, by: int, now_s: float) -> None:
        self._ongoing += by
        self._load.set(now_s, self._ongoing)

    def _await_step(self, replica: Replica) -> None:
        if replica.next_event_s is not None:
            self._push(replica.next_event_s, _Kind.STEP, replica.index, replica.version)

    def _push(self, time_s: float, kind: _Kind, replica: int = 0, version: int = 0) -> None:
        heapq.heappush(self._events, (time_s, kind, replica, version))

    def _note_replicas(self, now_s: float) -> None:
        running, starting = len(self._running), len(self._starting)
        count = ReplicaCount(now_s, running, starting, len(self._replicas) - running - starting)
        history = self._outcome.replica_counts
        if history and (running, starting, count.draining) == (
            history[-1].running,
            history[-1].starting,
            history[-1].draining,
        ):
            return
        if history and history[-1].time_s == now_s:
            history.pop()
        history.append(count)
