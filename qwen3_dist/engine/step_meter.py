"""What steps carried so far, and how long ranks had nothing to run. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qwen3_dist.engine.step_traffic import StepTraffic
from qwen3_dist.protocol.step_plan import StepPlan


class StepMeter:
    """Counts steps as they are submitted and collected. A step that runs again counts once.

    Ranks wait for requests while there is no work, and for the engine while there is work and no step in flight. How
    long they wait for each other inside a step only they could measure, and they do not.
    """

    def __init__(self, traffic: StepTraffic) -> None:
        self._traffic = traffic
        self.computed_tokens = 0
        self.last_tokens = self.last_sequences = 0  # of the step submitted last
        self.wait_for_requests_s = self.wait_for_engine_s = 0.0
        self.collected_s = self._work_s = (
            time.monotonic()
        )  # when a step ended, and when work came to an idle engine
        self._running_since_s: float | None = None  # when the oldest step in flight could begin

    @property
    def traffic(self) -> StepTraffic:
        return self._traffic

    @property
    def step_age_s(self) -> float:
        """Seconds for which the oldest step in flight has run; 0 if none is. May be read from any thread."""
        since = self._running_since_s
        return 0.0 if since is None else time.monotonic() - since

    def work_came(self) -> None:
        """Tells that an engine without work has some."""
        self._work_s = time.monotonic()

    def submitted(self, plans: Sequence[StepPlan], alone: bool) -> None:
        """Counts a step. `alone`: no other was in flight, so that the ranks have waited until now."""
        self.last_tokens = sum(plans[0].group_tokens)
        self.last_sequences = sum(len(plan.sequences) for plan in plans)
        self.computed_tokens += self.last_tokens
        self._traffic.add(self.last_tokens)
        if alone:
            now = self._running_since_s = time.monotonic()
            work_s = max(self.collected_s, self._work_s)
            self.wait_for_requests_s += work_s - self.collected_s
            self.wait_for_engine_s += now - work_s

    def collected(self, others: bool) -> None:
        """Tells that the oldest step has ended, and whether `others` are in flight."""
        self.collected_s = time.monotonic()
        self._running_since_s = self.collected_s if others else None
