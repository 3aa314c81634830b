"""Sampling setups that ask for one thing."""

from __future__ import annotations

from typing import Any

from qwen3_dist.protocol.sampling_setup import SamplingSetup


def setup(**changes: Any) -> SamplingSetup:
    plain: dict[str, Any] = {
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": (),
        "min_tokens": 0,
        "stop_token_ids": (),
        "eos_token_ids": (),
        "bad_words": (),
        "logprob_token_ids": (),
        "thinking": None,
        "reasoning": "none",
        "thinking_token_budget": None,
        "grammar": None,
    }
    return SamplingSetup(**{**plain, **changes})
