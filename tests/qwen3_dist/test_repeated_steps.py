"""Steps that overflowed are run again, with those after them, and no token changes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence as Items
from typing import Any

import pytest

from qwen3_dist.engine.in_flight import StepsInFlight
from qwen3_dist.launch.base import Executor
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, StepPlan, StepResult
from tests.qwen3_dist.test_scheduler_histories import FakeRanks, expected_output, prompt_of
from tests.scheduling import make_scheduler, make_sequence
from tests.setups import setup


class OverflowingRanks(Executor):
    """Ranks with a memory, whose steps overflow by chance unless they are exact: then all that they wrote and
    sampled is wrong."""

    num_blocks, device, backends = 20, "cpu", "none"

    def __init__(self, depth: int, chance: float, seed: int) -> None:
        self.depth = depth
        self.ran: list[StepPlan] = []
        self._chance = chance
        self._random = random.Random(seed)
        self._ranks = FakeRanks()
        self._results: deque[StepResult] = deque()

    def submit(self, plans: Items[StepPlan]) -> None:
        (plan,) = plans
        self.ran.append(plan)
        result = self._ranks.run(plan)
        if not plan.exact and self._random.random() < self._chance:
            self._ranks.spoil(plan)
            result = result._replace(token_ids=(5,) * len(result.token_ids), overflowed=True)
        self._results.append(result)

    def collect(self, limit_s: float | None = None) -> list[StepResult | None]:
        return [self._results.popleft()]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        raise NotImplementedError

    def check(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("depth", "stages"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_no_overflow_changes_a_token(
    seed: int, depth: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_dist.engine.in_flight._EXACT_STEPS", seed % 3)
    scheduler = make_scheduler(blocks=20, seqs=4, tokens=12, stages=stages, may_repeat=True)
    executor = OverflowingRanks(depth, 0.3, seed)
    steps = StepsInFlight(executor, lambda group, plan, renewed: scheduler.renew(plan, renewed))
    sequences = [make_sequence(n, prompt_of(seed * 1000 + 37 * n), max_tokens=9) for n in range(8)]
    choose = random.Random(seed)
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work or steps:
        while len(steps) < depth and (plan := scheduler.schedule()) is not None:
            steps.submit([plan])
        ((plan, result),) = steps.collect(None)
        assert result is not None and not result.overflowed
        scheduler.update(plan, result)
        for sequence in sequences:
            if sequence.finish_reason is None and choose.random() < 0.02:
                scheduler.finish(sequence, "abort")
        scheduler.blocks.check_integrity([*scheduler.running, *scheduler.waiting])
    assert steps.num_repeated > 0
    for sequence in sequences:
        prompt = sequence.token_ids[: sequence.prompt_len]
        output, expected = sequence.token_ids[sequence.prompt_len :], expected_output(prompt, 9)
        assert output == (expected[: len(output)] if sequence.finish_reason == "abort" else expected)
    assert scheduler.blocks.num_free == 20


def test_a_repeated_step_knows_its_tokens_and_starts_sampling_states_over() -> None:
    scheduler = make_scheduler()
    plain, penalised = make_sequence(0, [1, 2, 3]), make_sequence(1, [4, 5, 6])
    penalised.setup = setup(presence_penalty=1.0)
    for sequence in (plain, penalised):
        scheduler.add(sequence)
    first = scheduler.schedule()
    second = scheduler.schedule()
    third = scheduler.schedule()
    assert first is not None and second is not None and third is not None
    scheduler.update(first, StepResult(1, (7, 8), (None, None)))
    assert [part.token_ids for part in second.sequences] == [(LAST_SAMPLED,)] * 2
    renewed: set[int] = set()
    second, third = scheduler.renew(second, renewed), scheduler.renew(third, renewed)
    assert [part.token_ids for part in second.sequences] == [(7,), (8,)]
    assert second.sequences[0].setup is None
    assert second.sequences[1].setup == penalised.setup._replace(output=(8,))
    assert [part.token_ids for part in third.sequences] == [(LAST_SAMPLED,)] * 2  # the repeated second's
    assert [part.setup for part in third.sequences] == [None, None]
