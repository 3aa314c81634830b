"""Fields of config.json that settings replace, long contexts among them, and fields that nothing understands."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.planning.official import official_configs
from qwen3_dist import LLM, EngineConfig, ModelConfig, SamplingParams
from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.settings_reader import changed_settings, read_settings
from tests.checkpoints import write_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SIZES = {"model_type": "qwen3", "max_position_embeddings": 40960}
pytestmark = pytest.mark.usefixtures("nursery")


def read(folder: Path, raw: dict[str, Any], **overrides: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_directory(folder, HfOverrides.parse(overrides))


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_yarn_as_the_model_card_says_reaches_131072_tokens(tmp_path: Path, name: str) -> None:
    raw = official_configs()[name]
    assert read(tmp_path, raw).context_length == 40960
    edited, overridden = read(tmp_path, {**raw, "rope_scaling": YARN}), read(tmp_path, raw, rope_scaling=YARN)
    assert edited == overridden and edited.context_length == 131072 and edited.rope_base == raw["rope_theta"]


@pytest.mark.parametrize(
    "name", ["Qwen3-4B-Instruct-2507", "Qwen3-30B-A3B-Instruct-2507", "Qwen3-235B-A22B-Instruct-2507"]
)
def test_models_of_2507_have_their_long_context_without_yarn(tmp_path: Path, name: str) -> None:
    config = read(tmp_path, official_configs()[name])
    assert (config.context_length, config.rope_scaling) == (262144, None)


@pytest.mark.parametrize(
    ("raw", "overrides", "edited"),
    [
        ({"rope_theta": 1e6}, {"rope_scaling": YARN}, {"rope_theta": 1e6, "rope_scaling": YARN}),
        (  # the other spelling than the file's: its base stays
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
            {"rope_scaling": YARN},
            {"rope_theta": 5e6, "rope_scaling": YARN},
        ),
        (  # another factor than the file's, in the other spelling
            {"rope_theta": 1e6, "rope_scaling": {**YARN, "factor": 2.0}},
            {"rope_parameters": YARN},
            {"rope_theta": 1e6, "rope_scaling": YARN},
        ),
        (
            {"rope_parameters": {**YARN, "rope_theta": 1e6}},
            {"rope_theta": 5e6},
            {"rope_theta": 5e6, "rope_scaling": YARN},
        ),
        (
            {"rope_theta": 1e6},
            {"rope_parameters": {**YARN, "rope_theta": 5e6}},
            {"rope_theta": 5e6, "rope_scaling": YARN},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_parameters": {**YARN, "rope_theta": 5e6}},
            {"rope_theta": 5e6, "rope_scaling": YARN},
        ),
        ({"rope_theta": 1e6, "rope_scaling": YARN}, {"rope_scaling": None}, {"rope_theta": 1e6}),
        ({"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"dtype": "float16"}),
        ({}, {"max_position_embeddings": 8192}, {"max_position_embeddings": 8192}),
    ],
)
def test_an_override_is_an_edit_of_config_json(
    tmp_path: Path, raw: dict[str, Any], overrides: dict[str, Any], edited: dict[str, Any]
) -> None:
    assert read(tmp_path, {**SIZES, **raw}, **overrides) == read(tmp_path, {**SIZES, **edited})


def test_overrides_are_read_from_yaml_and_the_command_line() -> None:
    asked = {"rope_scaling": YARN}
    for given in (asked, json.dumps(asked)):
        config = read_settings(EngineConfig, {"hf_overrides": given})
        assert json.loads(str(config.hf_overrides)) == asked
        assert read_settings(EngineConfig, changed_settings(config)) == config
    for nothing in ({}, "", "{}"):
        assert read_settings(EngineConfig, {"hf_overrides": nothing}) == EngineConfig()


@pytest.mark.parametrize("given", ["yarn", "[]", "{", 7, ["a"], {"a": {1, 2}}])
def test_overrides_that_are_no_object_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="hf_overrides must be a JSON object such as") as refused:
        read_settings(EngineConfig, {"hf_overrides": given})
    assert refused.value.setting == ("hf_overrides",)


def test_an_override_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("rope_scalling", "attention_dropout", "emb_dim"):
        with pytest.raises(
            ConfigError, match=f"hf_overrides names '{name}', which this service does not read"
        ):
            read(tmp_path, SIZES, **{name: 0.5})
    with pytest.raises(ConfigError, match="two values of rope_theta"):
        read(tmp_path, {**SIZES, "rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e6}}, dtype="float16")
    with pytest.raises(CheckpointError, match="rope type 'linear' is not supported"):
        read(tmp_path, SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_every_rank_computes_with_the_overrides(tmp_path: Path) -> None:
    path, prompt = write_checkpoint(tmp_path, moe=False, max_position_embeddings=64), list(range(10, 90))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = AutoConfig.from_pretrained(path)
    config.rope_parameters = {**yarn, "rope_theta": 1e6}
    theirs = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
    ranks: dict[str, Any] = {"layout": "tp=2", "executor": "processes", "num_blocks": 16, "use_tqdm": False}
    with pytest.raises(ConfigError, match="max_model_len=256 exceeds the model's context of 64"):
        LLM(str(path), max_model_len=256, use_tqdm=False)
    with LLM(str(path), hf_overrides={"rope_scaling": yarn}, max_model_len=256, **ranks) as llm:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        [output] = llm.generate(prompt, params, use_tqdm=False)
        assert llm.max_model_len == 256
    assert output.prompt_logprobs is not None
    for place in range(1, len(prompt)):
        found = output.prompt_logprobs[place]
        assert found is not None and found.token_id == prompt[place]
        assert found.logprob == pytest.approx(float(logprobs[place - 1, prompt[place]]), abs=1e-3)


def test_a_field_that_nothing_understands_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_checkpoint(tmp_path, moe=True)
    config = json.loads((path / "config.json").read_text())
    for added, named in (
        ({}, ""),
        ({"logit_scale": 0.5, "mup_width": 4, "note": None}, "logit_scale, mup_width"),
    ):
        (path / "config.json").write_text(json.dumps({**config, **added}))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qwen3_dist"), LLM(str(path), num_blocks=8, use_tqdm=False):
            pass
        found = [record.getMessage() for record in caplog.records if "does not know" in record.getMessage()]
        assert len(found) == bool(named) and all(f"config.json has {named}, which" in each for each in found)
