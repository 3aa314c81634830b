"""Steps that were submitted and not yet collected. They are run again if one of them overflows.

An all-to-all of fixed capacity sends tokens to experts without the host reading any size. If the tokens of a step do
not fit, its result says `overflowed`: the result is void, and so are those of the steps submitted after it. All of
them are run again with an exact all-to-all, which has no capacity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from qwen3_dist.launch.base import Executor
from qwen3_dist.protocol.step_plan import StepPlan, StepResult

_EXACT_STEPS = (
    32  # after an overflow; a long prompt of similar tokens, the usual cause, has more steps to come
)

Renew = Callable[[int, StepPlan, set[int]], StepPlan]


class StepsInFlight:
    """Plans of the steps in flight, oldest first, one plan for each dp group.

    `renew(group, plan, renewed)` is `Scheduler.renew`: it updates the plan of a step that must run again.
    """

    def __init__(self, executor: Executor, renew: Renew) -> None:
        self._executor = executor
        self._renew = renew
        self._steps: deque[list[StepPlan]] = deque()
        self._exact_left = 0
        self.num_repeated = 0  # steps that were run again

    def restart(self) -> None:
        """Forgets all steps, which no rank will answer."""
        self._steps.clear()

    def __len__(self) -> int:
        return len(self._steps)

    def submit(self, plans: Sequence[StepPlan]) -> None:
        if self._exact_left:
            self._exact_left -= 1
            plans = [plan._replace(exact=True) for plan in plans]
        self._executor.submit(plans)
        self._steps.append(list(plans))

    def collect(self, limit_s: float | None) -> list[tuple[StepPlan, StepResult | None]]:
        """Waits for the oldest step. Returns each dp group's plan and result; None is the result of an empty plan.

        `limit_s` is that of `Executor.collect`.
        """
        results = self._executor.collect(limit_s)
        if any(result is not None and result.overflowed for result in results):
            self._run_again()
            results = self._executor.collect()
        return list(zip(self._steps.popleft(), results, strict=True))

    def _run_again(self) -> None:
        """Submits all steps in flight again, in order, after the ranks have finished them."""
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
