"""Numbers of a request that are larger than what ranks keep them in end no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import RequestError

HUGE = 10**400  # more than a float holds


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": HUGE},
        {"min_tokens": HUGE, "max_tokens": None},
        {"max_tokens": HUGE},
        {"thinking_token_budget": HUGE},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_request_of_many_sequences_with_a_large_number_is_served(
    nursery: None, checkpoints: dict[str, Path], fields: dict[str, Any]
) -> None:
    settings = {
        "layout": "tp=2",
        "executor": "processes",
        "num_blocks": 64,
        "max_model_len": 16,
        "use_tqdm": False,
    }
    with LLM(str(checkpoints["dense"]), **settings) as llm:
        params = SamplingParams(**{"n": 10, "max_tokens": 3, "temperature": 1.0, **fields})
        [output] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    assert len(output.outputs) == 10 and all(each.token_ids for each in output.outputs)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": HUGE},
        {"seed": HUGE},
        {"logit_bias": {1: HUGE}},
        {"presence_penalty": -HUGE},
        {"repetition_penalty": float("nan")},
        {"temperature": float("inf")},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_number_out_of_its_range_is_refused_whatever_its_size(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)
