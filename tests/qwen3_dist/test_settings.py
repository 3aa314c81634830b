"""Settings and sampling parameters refuse what they cannot mean, by name."""

from __future__ import annotations

import math
import pickle

import pytest

from qwen3_dist import EngineConfig, Layout, SamplingParams
from qwen3_dist.errors import ConfigError, RequestError
from qwen3_dist.settings_reader import read_settings
from qwen3_dist.speculation import Speculation


def test_settings_are_read_from_plain_values() -> None:
    config = read_settings(EngineConfig, {"model": "m", "layout": "tp=2,ep=2", "gpu_memory_utilization": 1})
    assert config.layout == Layout(tp=2, ep=2)
    assert config.gpu_memory_utilization == 1.0
    assert read_settings(EngineConfig, {"num_blocks": None}).num_blocks is None
    assert read_settings(EngineConfig, {"speculative": "ngram,k=3"}).speculative == Speculation(k=3)
    assert read_settings(EngineConfig, {"speculative": None}).speculative is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("block_size", "1_6", 16),
        ("block_size", "16.0", 16),
        ("num_blocks", "null", None),
        ("start_timeout_s", "1.5e2", 150.0),
        ("prefix_caching", "False", False),
        ("model", "null", "null"),
        ("revision", "7", "7"),
    ],
)
def test_text_is_read_as_the_settings_type(name: str, text: str, value: object) -> None:
    assert getattr(read_settings(EngineConfig, {name: text}), name) == value


def test_an_error_knows_the_path_of_its_setting() -> None:
    with pytest.raises(ConfigError) as refused:
        read_settings(EngineConfig, {"block_size": 0})
    assert refused.value.setting == ("block_size",)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"modle": "m"}, "unknown setting 'modle'; did you mean model?"),
        ({"xyzzy": "m"}, "unknown setting 'xyzzy'; known are block_size, "),
        ({"block_size": "many"}, "block_size must be a whole number, not 'many'"),
        ({"block_size": 1.5}, "block_size must be a whole number, not 1.5"),
        ({"block_size": True}, "block_size must be a whole number, not True"),
        ({"prefix_caching": "maybe"}, "prefix_caching must be true or false, not 'maybe'"),
        ({"device": 7}, "device must be text, not 7"),
        ({"block_size": 0}, "block_size must be positive, not 0"),
        ({"num_blocks": -1}, "num_blocks must be positive, not -1"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be above 0 and at most 1, not 1.5"),
        (
            {"num_blocks": 64, "kv_cache_gib": 1},
            "num_blocks and kv_cache_gib both size the KV cache; keep one",
        ),
        ({"layout": "tp=x"}, "layout 'tp=x'"),
        ({"speculative": "eagle"}, "speculative must be ngram"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_settings(EngineConfig, values)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_sampling_parameter_out_of_range_is_named(params: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError, match=f"^{param} must be ") as error:
        SamplingParams(**params)  # type: ignore[arg-type]
    assert error.value.param == param


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_errors_cross_processes_with_what_they_know() -> None:
    error = pickle.loads(pickle.dumps(RequestError("no", param="n", status=413)))
    assert (str(error), error.param, error.status) == ("no", "n", 413)
