"""Log-probabilities of prompts against the reference, whatever steps compute them and on whatever ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.model.reference import load_reference
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.worker.sampling import prompt_outputs
from tests.checkpoints import TIGHT

SHARED = list(range(20, 46))
PROMPTS = [[*SHARED, 60 + i, 3] for i in range(5)] + [[9], [7, 8], list(range(100, 133))]
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=3)
pytestmark = pytest.mark.usefixtures("nursery")


def expected(path: Path, prompt: list[int], top: int) -> list[TokenLogprob | None]:
    logprobs = load_reference(path)(torch.tensor(prompt)).log_softmax(dim=-1)
    out: list[TokenLogprob | None] = [None]
    for row, target in zip(logprobs, prompt[1:], strict=False):
        values, ids = row.topk(top)
        likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        rank = int((row > row[target]).sum()) + 1
        out.append(TokenLogprob(target, float(row[target]), likeliest, rank))
    return out


def check(path: Path, prompt: list[int], got: list[TokenLogprob | None] | None, top: int = 3) -> None:
    assert got is not None
    for ours, theirs in zip(got, expected(path, prompt, top), strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert ours.token_id == theirs.token_id
        assert ours.rank is not None and theirs.rank is not None
        assert abs(ours.rank - theirs.rank) <= 1  # logits may differ by less than two tokens' do
        assert math.isclose(ours.logprob, theirs.logprob, abs_tol=1e-4)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        for (_, mine), (_, other) in zip(ours.top, theirs.top, strict=True):
            assert math.isclose(mine, other, abs_tol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layout", "blocks"),
    [
        ("dense", "tp=1", 24),
        ("dense", "tp=2", 24),
        ("dense", "pp=2", 24),
        ("moe", "tp=2,ep=2", 24),
        ("moe", "dp=2,ep=2", 17),  # of each group, which has half the sequences
    ],
)
def test_every_layout_scores_prompts_as_the_reference_through_chunks_and_preemption(
    checkpoints: dict[str, Path], kind: str, layout: str, blocks: int
) -> None:
    form = "in_process" if layout == "tp=1" else "processes"
    generated = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True, prompt_logprobs=3)
    tight = {**TIGHT, "num_blocks": blocks}
    with LLM(str(checkpoints[kind]), layout=layout, executor=form, **tight) as llm:
        outputs = llm.generate(PROMPTS, generated, use_tqdm=False)
        assert llm._engine.stats().preemptions > 0
        alone = llm.generate(PROMPTS, SCORED, use_tqdm=False)
        llm._engine.check_integrity()
        stats = llm._engine.stats()
    for prompt, output, scored in zip(PROMPTS, outputs, alone, strict=True):
        check(checkpoints[kind], prompt, output.prompt_logprobs)
        check(checkpoints[kind], prompt, scored.prompt_logprobs)
        assert len(output.token_ids) == 14
        assert (scored.token_ids, scored.finish_reason) == ([], "length")
    assert stats.free_blocks == stats.total_blocks


def test_a_scored_prompt_fills_the_prefix_cache_and_reads_nothing_from_it(
    checkpoints: dict[str, Path],
) -> None:
    path = checkpoints["dense"]
    with LLM(str(path), block_size=4, use_tqdm=False) as llm:
        for _ in range(2):
            [output] = llm.generate(PROMPTS[:1], SCORED, use_tqdm=False)
            assert output.num_cached_tokens == 0
            check(path, PROMPTS[0], output.prompt_logprobs)
        [output] = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1), use_tqdm=False)
        assert output.num_cached_tokens == 24 and output.prompt_logprobs is None


def test_choices_share_one_scoring_of_their_prompt(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["dense"]
    params = SamplingParams(n=3, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    with LLM(str(path), block_size=4, use_tqdm=False) as llm:
        [output] = llm.generate(PROMPTS[:1], params, use_tqdm=False)
        assert llm._engine.stats().cached_prompt_tokens == 2 * 24
    check(path, PROMPTS[0], output.prompt_logprobs, top=0)
    assert [len(choice.token_ids) for choice in output.outputs] == [2, 2, 2]


def test_a_long_prompt_is_scored_a_few_rows_at_a_time(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_outputs, "PROMPT_LOGPROBS_ROWS", 5)
    with LLM(str(checkpoints["dense"]), use_tqdm=False) as llm:
        outputs = llm.generate(PROMPTS, SCORED, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check(checkpoints["dense"], prompt, output.prompt_logprobs)


def test_a_prompt_that_fills_the_context_can_be_scored_but_not_continued(
    checkpoints: dict[str, Path],
) -> None:
    full = list(range(64))
    with LLM(str(checkpoints["dense"]), max_model_len=64, num_blocks=4, use_tqdm=False) as llm:
        [output] = llm.generate([full], SCORED, use_tqdm=False)
        check(checkpoints["dense"], full, output.prompt_logprobs)
        with pytest.raises(ValueError, match="64 tokens and the context holds 64, the output included"):
            llm.generate([full], SamplingParams(max_tokens=1, prompt_logprobs=3))
        with pytest.raises(ValueError, match="65 tokens and the context holds 64; shorten"):
            llm.generate([[*full, 1]], SCORED)
