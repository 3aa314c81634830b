"""What steps carried so far, and how long ranks had nothing to run. Imports no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from qwen3_dist.engine.step_traffic import StepTraffic
from qwen3_dist.protocol.step_plan import StepPlan

_HUNG_FACTOR = 20.0  # a step hangs once it has run for so many times the longest recent one
_DECAY = 0.995  # a step: the longest step counts half after 140 more
_LONG_S = 0.01


class StepMeter:
    """Counts steps as they are submitted and collected. A step that runs again counts once.

    Ranks wait for requests while there is no work, and for the engine while there is work and no step in flight. How
    long they wait for each other inside a step only they can measure (`rank_pace.py`).
    """

    def __init__(self, traffic: StepTraffic, watchdog_s: float) -> None:
        """A step does not count as hung before `watchdog_s`: a busy host may delay one of 20 ms by seconds."""
        self._traffic = traffic
        self._watchdog_s = watchdog_s
        self.computed_tokens = self.collected_steps = 0
        self.last_tokens = self.last_sequences = 0  # of the step submitted last
        self.wait_for_requests_s = self.wait_for_engine_s = 0.0
        self.collected_s = self._work_s = (
            time.monotonic()
        )  # when a step ended, and when work came to an idle engine
        self._running_since_s: float | None = None  # when the oldest step in flight could begin
        self._in_flight: deque[int] = deque()  # tokens of each step in flight, of the dp group with most
        # Maxima over recent steps, which decay.
        self._longest_s = 0.0
        self._most_tokens = 0.0
        self._last_s = 0.0  # of the step collected last

    def restart(self, traffic: StepTraffic) -> None:
        """Forgets the steps in flight, which no rank will answer. `traffic` counts on from now on."""
        traffic.total = self._traffic.total
        self._traffic = traffic
        self._in_flight.clear()
        self._running_since_s = None
        self.collected_s = time.monotonic()

    @property
    def traffic(self) -> StepTraffic:
        return self._traffic

    @property
    def step_age_s(self) -> float:
        """Seconds for which the oldest step in flight has run; 0 if none is. May be read from any thread."""
        since = self._running_since_s
        return 0.0 if since is None else time.monotonic() - since

    @property
    def in_long_step(self) -> bool:
        """Whether a step is in flight, and the last one took so long that the engine's thread may give another one the
        GIL, which that keeps for `sys.getswitchinterval()`, 5 ms."""
        return self._running_since_s is not None and self._last_s > _LONG_S

    def stalled(self) -> str:
        """Why the oldest step in flight seems to hang: it has run longer than any recent step should make it; "" if
        it does not. May be called from any thread."""
        age, limit = self.step_age_s, self.limit_s
        if limit is None or age <= limit:
            return ""
        usual = f"recent ones took {self._longest_s:.2g} s at most"
        return f"a step has run for {age:.1f} s, where {usual}; a rank may hang"

    @property
    def limit_s(self) -> float | None:
        """The seconds after which the oldest step in flight counts as hung; None before the first step has ended. A
        step of more tokens than any recent one may take longer in proportion. May be read from any thread."""
        longest, most = self._longest_s, self._most_tokens
        if not longest:
            return None
        try:
            tokens = self._in_flight[0]
        except IndexError:  # it has just ended
            tokens = 0
        return max(self._watchdog_s, _HUNG_FACTOR * longest * max(1.0, tokens / most))

    def work_came(self) -> None:
        """Tells that an engine without work has some."""
        self._work_s = time.monotonic()

    def submitted(self, plans: Sequence[StepPlan], alone: bool) -> None:
        """Counts a step. `alone`: no other was in flight, so that the ranks have waited until now."""
        self.last_tokens = sum(plans[0].group_tokens)
        self.last_sequences = sum(len(plan.sequences) for plan in plans)
        self.computed_tokens += self.last_tokens
        self._traffic.add(self.last_tokens)
        self._in_flight.append(max(plans[0].group_tokens))
        if alone:
            now = self._running_since_s = time.monotonic()
            work_s = max(self.collected_s, self._work_s)
            self.wait_for_requests_s += work_s - self.collected_s
            self.wait_for_engine_s += now - work_s

    def collected(self, others: bool) -> None:
        """Tells that the oldest step has ended, and whether `others` are in flight."""
        self.collected_s = time.monotonic()
        self.collected_steps += 1
        if self._running_since_s is not None:
            took_s = self.collected_s - self._running_since_s
            # In this order: `limit_s`, in another thread, divides by the first once it sees the second.
            self._most_tokens = max(self._in_flight.popleft(), _DECAY * self._most_tokens)
            self._longest_s = max(took_s, _DECAY * self._longest_s)
            self._last_s = took_s
        self._running_since_s = self.collected_s if others else None
