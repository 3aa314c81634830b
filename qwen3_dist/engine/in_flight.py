"""The steps that were submitted and not yet collected, and what happens when one of them is void.

Experts' tokens may travel in exchanges of a fixed capacity, whose sizes no host has to read. A step whose tokens did
not fit says so in its result: nothing in it counts, nor in the steps that were submitted after it and built on it.
All of them are run again, by a way that has no capacity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from qwen3_dist.launch.base import Executor
from qwen3_dist.protocol.step_plan import StepPlan, StepResult

_EXACT_STEPS = 32  # after an overflow: what caused it, a long prompt of like tokens, has steps to come

Renew = Callable[[int, StepPlan, set[int]], StepPlan]


class StepsInFlight:
    """Plans of each step, one for every dp group, in the order of their steps.

    `renew(group, plan, renewed)` gives a plan what became known since it was made, for the sequences that are not in
    `renewed`, and adds them (`Scheduler.renew`).
    """

    def __init__(self, executor: Executor, renew: Renew) -> None:
        self._executor = executor
        self._renew = renew
        self._steps: deque[list[StepPlan]] = deque()
        self._exact_left = 0
        self.num_repeated = 0  # steps that were run again

    def __len__(self) -> int:
        return len(self._steps)

    def submit(self, plans: Sequence[StepPlan]) -> None:
        if self._exact_left:
            self._exact_left -= 1
            plans = [plan._replace(exact=True) for plan in plans]
        self._executor.submit(plans)
        self._steps.append(list(plans))

    def collect(self) -> list[tuple[StepPlan, StepResult | None]]:
        """Waits for the oldest step: each dp group's plan with its result, None for a group without sequences."""
        results = self._executor.collect()
        if any(result is not None and result.overflowed for result in results):
            self._run_again()
            results = self._executor.collect()
        return list(zip(self._steps.popleft(), results, strict=True))

    def _run_again(self) -> None:
        """Submits all steps in flight anew, in their order, once the ranks are done with them."""
        for _ in range(len(self._steps) - 1):
            self._executor.collect()
        renewed: set[int] = set()
        again = [
            [self._renew(group, plan, renewed)._replace(exact=True) for group, plan in enumerate(plans)]
            for plans in self._steps
        ]
        for plans in again:
            self._executor.submit(plans)
        self.num_repeated += len(again)
        self._exact_left = _EXACT_STEPS
