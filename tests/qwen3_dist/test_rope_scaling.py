"""RoPE as config.json spells it: transformers' frequencies, or a refusal that names the setting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import QwenDistError
from qwen3_dist.model.reference import rotation
from qwen3_dist.model.rope import rope_frequencies

SIZES = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
    "max_position_embeddings": 40960,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OLDER_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARN_MSCALE = 0.1 * math.log(4) + 1


def read(**settings: Any) -> ModelConfig:
    return ModelConfig.from_dict({**SIZES, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {}},
        {"rope_theta": 1000000, "rope_scaling": YARN},
        {"rope_theta": 1e6, "rope_scaling": OLDER_YARN},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "type": "yarn"}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}},
        {"rope_parameters": {"rope_theta": 5e6}},
        {"rope_theta": 5e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "attention_factor": 0.9}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "attention_factor": None, "beta_fast": None}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "mscale": 0.7}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "truncate": False}},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "factor": 1.0}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.5}},
        {"rope_theta": 1e6, "partial_rotary_factor": 1.0, "rope_scaling": YARN},
        {"rope_theta": 20.0, "rope_scaling": YARN},
    ],
)
def test_frequencies_are_those_of_transformers(settings: dict[str, Any]) -> None:
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**{**SIZES, **given}))
    config = read(**settings)
    frequencies, mscale = rope_frequencies(config)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-5, atol=0)
    assert mscale == pytest.approx(theirs.attention_scaling)
    cos, _ = rotation(config, 3)
    expected = (torch.arange(3.0)[:, None] * theirs.inv_freq.repeat(2)).cos() * theirs.attention_scaling
    torch.testing.assert_close(cos, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "mscale"),
    [
        ({"attn_factor": 1 / YARN_MSCALE}, 1.0),
        ({"attn_factor": 0.5, "apply_yarn_scaling": False}, 0.5),
        ({"apply_yarn_scaling": False}, 1.0),
        ({"extrapolation_factor": 1, "finetuned": True}, YARN_MSCALE),
    ],
)
def test_the_spellings_of_vllm_mean_what_they_do_there(changes: dict[str, Any], mscale: float) -> None:
    """vLLM multiplies YaRN's own factor by `attn_factor`."""
    _, found = rope_frequencies(read(rope_theta=1e6, rope_scaling={**YARN, **changes}))
    assert found == pytest.approx(mscale)


def test_yarn_added_to_a_file_of_transformers_5_keeps_the_base_of_that_file() -> None:
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling=YARN)
    assert config == read(rope_theta=1e6, rope_scaling=YARN)
    assert config.rope_base == 1e6 and config.rope_scaling is not None


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (YARN, 131072),
        ({**YARN, "factor": 2.0}, 65536),
        ({"type": "yarn", "factor": 2.0}, 81920),
        (None, 40960),
    ],
)
def test_the_context_of_yarn_is_the_original_one_times_the_factor(scaling: Any, context: int) -> None:
    """Qwen's model cards add YaRN and leave max_position_embeddings as it was."""
    assert read(rope_theta=1e6, rope_scaling=scaling).context_length == context


def test_a_file_that_names_the_stretched_context_already_keeps_it() -> None:
    assert read(rope_theta=1e6, rope_scaling=YARN, max_position_embeddings=131072).context_length == 131072


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope type 'llama3'"),
        ({"rope_scaling": {"rope_type": "Yarn", "factor": 4}}, "rope type 'Yarn'"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "type 'linear' and rope_type 'yarn'"),
        (
            {"rope_scaling": {"factor": 4.0}},
            "rope type 'default' has no setting 'factor'; set rope_type to 'yarn'",
        ),
        ({"rope_scaling": {**YARN, "attention_scale": 2}}, "has no setting 'attention_scale'; leave it out"),
        ({"rope_parameters": {"full_attention": YARN}}, "has no setting 'full_attention'"),
        ({"rope_parameters": YARN, "rope_scaling": {"rope_type": "default"}}, "disagree about rope_type"),
        ({"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2.0}}, "disagree about factor"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 4096}, "two values of original_max"),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e6}},
            "two values of rope_theta: 1000000.0 and 5",
        ),
        ({"rope_theta": 1e6, "rope_scaling": {**YARN, "rope_theta": 5e6}}, "two values of rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn"}}, "needs factor"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor of RoPE must be a number"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor of RoPE must be at least 1"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1.5}}, "positive integer"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.0, "attn_factor": 1.0}}, "keep one of them"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "must be positive"),
        ({"rope_scaling": {**YARN, "extrapolation_factor": 0.5}}, "extrapolation_factor"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate of RoPE must be true or false"),
        ({"rope_theta": "1e6"}, "rope_theta of RoPE must be a number"),
        ({"rope_theta": 0}, "rope_theta must be a number above 1"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(QwenDistError, match=sentence):
        read(**settings)


def test_the_references_own_keys_are_read_by_the_same_rules() -> None:
    sizes = {
        "vocab_size": 99,
        "emb_dim": 256,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_groups": 2,
        "hidden_dim": 64,
    }
    given = {**sizes, "head_dim": 64, "context_length": 40960, "rope_base": 1e6}
    plain, stretched = ModelConfig.from_dict(given), ModelConfig.from_dict({**given, "rope_scaling": YARN})
    assert (plain.rope_base, plain.rope_scaling, plain.context_length) == (1e6, None, 40960)
    assert (stretched.rope_base, stretched.context_length) == (1e6, 131072)
    with pytest.raises(QwenDistError, match="rope type 'linear'"):
        ModelConfig.from_dict({**given, "rope_scaling": {"type": "linear", "factor": 2}})
