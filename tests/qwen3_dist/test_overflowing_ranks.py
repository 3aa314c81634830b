"""Real ranks whose exchanges of experts' rows have too little room: the engine runs their steps again."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine import in_flight
from qwen3_dist.launch import processes
from tests import planted_ranks
from tests.checkpoints import write_checkpoint
from tests.ranks import by_name

PROMPTS = [list(range(3, 60)), [7, 1, 150, 198, 0], [42], [9] * 80, list(range(100, 117))]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True),
    SamplingParams(
        max_tokens=24, temperature=0, presence_penalty=1.5, frequency_penalty=0.5, ignore_eos=True
    ),
    SamplingParams(max_tokens=9, temperature=0, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=1.0, seed=7, logit_bias={5: 2.0}, ignore_eos=True),
]
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "dp=2,ep=2"])
def test_overflows_change_no_token(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prompts beside decodes, in a cache so small that sequences are preempted, planned a step ahead."""
    checkpoint = str(write_checkpoint(tmp_path, moe=True))
    with LLM(checkpoint, dtype="float32", use_tqdm=False) as alone:
        expected = alone.generate(PROMPTS, PARAMS, use_tqdm=False)
    monkeypatch.setattr(processes.ProcessLauncher, "main", by_name(planted_ranks.rank_with_room_for_few_rows))
    monkeypatch.setattr(in_flight, "_EXACT_STEPS", 1)  # so that many steps may overflow
    few = {"num_blocks": 14, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    with LLM(
        checkpoint, layout=layout, executor="processes", moe_dispatch="all_to_all", use_tqdm=False, **few
    ) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        stats = llm._engine.stats()
        llm._engine.check_integrity()
    assert stats.repeated_steps > 10
    assert stats.free_blocks == stats.total_blocks
    for output, alone_output in zip(outputs, expected, strict=True):
        assert output.token_ids == alone_output.token_ids
    scores = [entry.logprob for entry in outputs[3].prompt_logprobs[1:]]  # type: ignore[index, union-attr]
    alone_scores = [entry.logprob for entry in expected[3].prompt_logprobs[1:]]  # type: ignore[index, union-attr]
    assert scores == pytest.approx(alone_scores, abs=1e-4)
