"""Speculation changes no token and no distribution: real ranks, small caches, every kind of step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.protocol.outputs import RequestOutput
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.speculation import Speculation
from qwen3_dist.worker.sampling.sampler import sample
from tests.checkpoints import TIGHT

SHARED = list(range(20, 46))
PROMPTS = [[*SHARED, 60 + i, 3] for i in range(3)]
PROMPTS += [[5, 6, 7, 8] * 6, [9, 11] * 5, [7, 7, 7], list(range(100, 150)), [3]]
LENGTH = 31
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=LENGTH, temperature=0.3, top_p=0.9, seed=5, ignore_eos=True, logprobs=2)
GUESSING = "ngram,k=5,min=1,max=3"
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, tuple[list[RequestOutput], list[RequestOutput]]]:
    """What one rank gives without speculation, greedy and drawn."""
    outputs = {}
    for kind, path in checkpoints.items():
        with LLM(str(path), use_tqdm=False) as llm:
            greedy, drawn = (llm.generate(PROMPTS, params, use_tqdm=False) for params in (GREEDY, DRAWN))
        outputs[kind] = (greedy, drawn)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("kind", "layout", "blocks", "settings"),
    [
        ("dense", "tp=1", 24, {}),
        ("dense", "tp=1", 400, {"max_num_batched_tokens": 512}),
        ("moe", "tp=1", 24, {"prefix_caching": False}),
        ("dense", "tp=2", 24, {}),
        ("dense", "pp=2", 24, {}),
        ("moe", "tp=2,ep=2", 24, {"overlap": False}),
        ("moe", "tp=2,ep=2", 24, {"moe_dispatch": "all_to_all"}),
        ("moe", "dp=2,ep=2", 21, {}),  # of each group, which has half the sequences
        ("moe", "dp=2,ep=2", 21, {"moe_dispatch": "all_to_all"}),
    ],
)
def test_guesses_change_no_token(
    checkpoints: dict[str, Path],
    expected: dict[str, tuple[list[RequestOutput], list[RequestOutput]]],
    kind: str,
    layout: str,
    blocks: int,
    settings: dict[str, Any],
) -> None:
    form = "in_process" if layout == "tp=1" else "processes"
    settings = {**TIGHT, "num_blocks": blocks, "executor": form, "speculative": GUESSING, **settings}
    with LLM(str(checkpoints[kind]), layout=layout, **settings) as llm:
        for _ in range(2):  # the second time prefixes are cached
            greedy, drawn = (llm.generate(PROMPTS, params, use_tqdm=False) for params in (GREEDY, DRAWN))
            assert tokens(greedy) == tokens(expected[kind][0])
            assert tokens(drawn) == tokens(expected[kind][1])
        llm._engine.check_integrity()
        stats = llm._engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.free_blocks == stats.total_blocks
    assert (stats.preemptions > 0) == (blocks < 400)
    for mine, theirs in zip(drawn, expected[kind][1], strict=True):
        assert mine.logprobs is not None and theirs.logprobs is not None
        assert [each.token_id for each in mine.logprobs] == mine.token_ids
        for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_guesses_save_steps_where_a_text_repeats_itself(checkpoints: dict[str, Path]) -> None:
    steps = {}
    for speculative in (None, GUESSING):
        with LLM(str(checkpoints["dense"]), speculative=speculative, use_tqdm=False) as llm:
            llm.generate([5, 6, 7, 8] * 6, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
            steps[speculative] = llm._engine.stats().steps
    assert steps[None] == 200 and steps[GUESSING] < 100


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_a_sequence_ends_among_guesses_where_it_ends_without_them(
    checkpoints: dict[str, Path], params: SamplingParams
) -> None:

    with (
        LLM(str(checkpoints["dense"]), use_tqdm=False) as plain,
        LLM(str(checkpoints["dense"]), speculative=GUESSING, use_tqdm=False) as guessing,
    ):
        outputs = plain.generate(PROMPTS, params, use_tqdm=False)
        for at in range(1, LENGTH, 3):
            cut = [replace(params, max_tokens=at)] * len(PROMPTS)
            stopped = [replace(params, stop_token_ids=(output.token_ids[at],)) for output in outputs]
            for given in (cut, stopped):
                mine = guessing.generate(PROMPTS, given, use_tqdm=False)
                theirs = plain.generate(PROMPTS, given, use_tqdm=False)
                assert tokens(mine) == tokens(theirs)
                assert [each.finish_reason for each in mine] == [each.finish_reason for each in theirs]
        assert guessing._engine.stats().accepted_tokens > 0


def test_nothing_is_kept_of_guesses_after_a_stop_string() -> None:
    prompt = "one two three four five six seven. one two three four five six seven. one two"
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=0)
    settings: dict[str, Any] = {"dtype": "float32", "num_blocks": 64, "use_tqdm": False}
    with LLM(**settings) as plain, LLM(**settings, speculative=GUESSING) as guessing:
        whole = plain.generate(prompt, params, use_tqdm=False)[0].text
        assert whole is not None
        for at in range(0, len(whole) - 4, 3):
            stopping = replace(params, stop=(whole[at : at + 4],))
            mine, theirs = (llm.generate(prompt, stopping, use_tqdm=False)[0] for llm in (guessing, plain))
            assert (mine.token_ids, mine.text, mine.finish_reason) == (theirs.token_ids, theirs.text, "stop")
            assert mine.logprobs is not None and len(mine.logprobs) == len(mine.token_ids)
        assert guessing._engine.stats().accepted_tokens > 0


class Chain:
    """Ranks whose next token depends on the last one alone, by a table of probabilities [V, V]."""

    def __init__(self, table: torch.Tensor) -> None:
        self._logits = table.log()

    def run(self, plan: StepPlan) -> StepResult:
        rows, specs = [], []
        for part in plan.sequences:
            specs += part.sample_specs
            rows += part.token_ids[len(part.token_ids) - len(part.sample_specs) :]
        drawn = sample(self._logits[rows], specs, TorchOps()).tolist() if rows else []
        return StepResult(plan.step, tuple(drawn), (None,) * len(drawn))


def test_what_is_drawn_after_guesses_has_the_models_distribution() -> None:
    table = torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.15, 0.6], [0.7, 0.2, 0.1]])
    limits = SchedulerLimits(64, 512, speculation=Speculation(k=4, min=1), free_tokens=1000)
    scheduler, ranks = Scheduler(BlockManager(2000, 16), limits, frozenset()), Chain(table)
    sequences = [
        Sequence(seed, str(seed), 0, [seed % 3], SamplingParams(temperature=1), seed, 100)
        for seed in range(200)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    while (plan := scheduler.schedule()) is not None:
        scheduler.update(plan, ranks.run(plan))
    pairs = Counter(pair for s in sequences for pair in zip(s.token_ids, s.token_ids[1:], strict=False))
    assert scheduler.counts.accepted_tokens > 1000
    chi_square = 0.0
    for before in range(3):
        total = sum(pairs[before, after] for after in range(3))
        for after in range(3):
            wanted = total * float(table[before, after])
            chi_square += (pairs[before, after] - wanted) ** 2 / wanted
    assert chi_square < 28  # the seeds are fixed; 6 degrees of freedom pass this with p < 1e-4
