"""Both spellings of config.json, and the numerics they ask for, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.planning.memory import inspect_model
from qwen3_dist import LLM, ModelConfig, SamplingParams
from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.model.reference import load_reference
from tests.checkpoints import write_checkpoint

OLD: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 40960,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 48,
}


def without(config: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {**{name: value for name, value in config.items() if name not in names}, **changes}


def test_both_spellings_give_one_config() -> None:
    new = without(
        OLD,
        *("num_experts", "rope_theta", "rope_scaling", "torch_dtype"),
        num_local_experts=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        dtype="bfloat16",
    )
    assert ModelConfig.from_dict(OLD) == ModelConfig.from_dict(new)
    config = ModelConfig.from_dict(OLD)
    assert (config.num_experts, config.rope_base, config.dtype) == (128, 1e6, "bfloat16")
    assert config.sliding_window is None


def test_what_a_file_leaves_out_is_what_transformers_assumes() -> None:
    config = ModelConfig.from_dict({"model_type": "qwen3_moe", "head_dim": 64})
    assert (config.n_kv_groups, config.num_experts, config.norm_topk_prob) == (4, 128, False)
    derived = ModelConfig.from_dict(
        {"model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 16}
    )
    assert derived.head_dim == 128


def test_moe_layers_follow_the_rule() -> None:
    config = ModelConfig.from_dict(
        without(OLD, num_hidden_layers=8, decoder_sparse_step=2, mlp_only_layers=[3])
    )
    assert [layer for layer in range(8) if config.is_moe_layer(layer)] == [1, 5, 7]
    assert not any(ModelConfig.from_dict({"model_type": "qwen3"}).is_moe_layer(i) for i in range(32))


def test_null_is_what_transformers_assumes() -> None:
    nulls = dict.fromkeys(("rms_norm_eps", "max_position_embeddings", "mlp_only_layers", "norm_topk_prob"))
    absent = without(OLD, *nulls)
    assert ModelConfig.from_dict({**OLD, **nulls}) == ModelConfig.from_dict(absent)
    assert ModelConfig.from_dict(absent).context_length == 32768


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"model_type": "llama"}, CheckpointError, "model_type 'llama' is not supported"),
        ({"model_type": None}, CheckpointError, "model_type None is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, CheckpointError, "quantisation 'hqq'"),
        ({"hidden_act": "gelu"}, CheckpointError, "hidden_act 'gelu'"),
        ({"compression_config": {"quant_method": "x"}}, CheckpointError, "quantisation 'x'"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, CheckpointError, "architecture 'Qwen3ForTok"),
        ({"is_causal": False}, CheckpointError, "is_causal False is not supported"),
        ({"use_bidirectional_attention": True}, CheckpointError, "use_bidirectional_attention True"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, CheckpointError, "dual_chunk_attention_config"),
        ({"num_local_experts": 64}, ConfigError, "num_experts and num_local_experts disagree: 128 and 64"),
        ({"layer_types": ["sliding_attention"] * 48}, CheckpointError, "layer_types disagree with use_sl"),
        ({"layer_types": ["full_attention"] * 4}, CheckpointError, "for each of 48 layers"),
        ({"layer_types": ["linear_attention"] * 48}, CheckpointError, "layer_types must name"),
        ({"use_sliding_window": True, "sliding_window": -1}, ConfigError, "sliding_window must be a pos"),
        ({"tie_word_embeddings": "false"}, ConfigError, "tie_word_embeddings must be true or false"),
        ({"norm_topk_prob": 1}, ConfigError, "norm_topk_prob must be true or false"),
        ({"attention_bias": "no"}, ConfigError, "attention_bias must be true or false"),
        ({"rms_norm_eps": "1e-6"}, ConfigError, "rms_norm_eps must be a positive number"),
        ({"mlp_only_layers": ["3"]}, ConfigError, "mlp_only_layers must be a list of layers"),
        ({"decoder_sparse_step": 0}, ConfigError, "decoder_sparse_step must be a positive integer"),
        ({"num_hidden_layers": "48"}, ConfigError, "num_hidden_layers and max_window_layers must be"),
        ({"num_key_value_heads": 5}, ConfigError, "n_heads=32 is not a multiple of n_kv_groups=5"),
        ({"num_hidden_layers": 0}, ConfigError, "n_layers must be a positive integer, not 0"),
        ({"num_experts_per_tok": 200}, ConfigError, "num_experts_per_tok=200 must lie between 1 and"),
        ({"torch_dtype": "float8"}, ConfigError, "dtype 'float8' is not one of"),
        ({"num_hidden_layers": 10**9}, ConfigError, "n_layers must be at most 4096"),
        (
            {"num_attention_heads": 0, "head_dim": None},
            ConfigError,
            "n_heads must be a positive integer, not 0",
        ),
        (
            {"hidden_size": "64", "head_dim": None},
            ConfigError,
            "emb_dim must be a positive integer, not '64'",
        ),
        ({"moe_intermediate_size": 1.5}, ConfigError, "moe_hidden_dim must be an integer, not 1.5"),
        ({"num_experts": [128]}, ConfigError, r"num_experts must be an integer, not \[128\]"),
        ({"architectures": 5}, CheckpointError, "architectures is 5 where a list of names is expected"),
        ({"layer_types": 5}, CheckpointError, "layer_types must name"),
    ],
)
def test_what_makes_no_model_is_refused(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        ModelConfig.from_dict({**OLD, **changes})


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        ModelConfig.from_directory(tmp_path)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("moe", "changes"),
    [
        (False, {"rope_parameters": YARN}),
        (True, {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}),
        (False, {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
        (False, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
        (
            False,
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
        (True, {"use_sliding_window": True, "sliding_window": 9}),
    ],
)
def test_yarn_and_sliding_windows_equal_transformers(
    tmp_path: Path, moe: bool, changes: dict[str, Any]
) -> None:
    path = write_checkpoint(tmp_path, moe=moe, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    prompt = list(range(10, 90))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([prompt])).logits[0]
    reference = load_reference(path)
    assert torch.allclose(reference(torch.tensor(prompt)), expected, atol=1e-4)
    with LLM(str(path), use_tqdm=False, max_num_batched_tokens=32) as llm:  # chunks cross the window
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        got = llm.generate(prompt, params, use_tqdm=False)[0].token_ids
    assert got == reference.generate_greedy(prompt, 6)


def test_both_spellings_of_yarn_give_one_config(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=False, rope_parameters=YARN)
    config = json.loads((path / "config.json").read_text())
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    old = without(config, "rope_parameters", rope_theta=1e6, rope_scaling=scaling)
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(config)
    assert ModelConfig.from_dict(old).rope_scaling is not None


def test_an_engine_offers_the_context_that_yarn_reaches(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=False, rope_parameters=YARN, max_position_embeddings=80)
    with pytest.raises(ConfigError, match="max_model_len=257 exceeds the model's context of 256; lower it"):
        LLM(str(path), max_model_len=257, use_tqdm=False)
    with LLM(str(path), max_model_len=256, num_blocks=32, use_tqdm=False) as llm:
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        assert len(llm.generate([1] * 250, params, use_tqdm=False)[0].token_ids) == 6
    assert inspect_model("m", ModelConfig.from_directory(path), Layout(), 1)["sizes"]["context_length"] == 256
