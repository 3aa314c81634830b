"""LoRA adapters equal checkpoints into which they are merged, alone and mixed, in every layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError, ConfigError, RequestError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.model.lora import LowRank
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.protocol.outputs import RequestOutput
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep, StepPlan
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from qwen3_dist.weights.adapter_files import Adapter
from tests.adapters import ATTENTION, EVERYTHING, merge, write_adapter
from tests.batches import batch_of
from tests.checkpoints import write_checkpoint

PROMPTS = [list(range(3, 40)), [7, 1, 150, 198, 0], [42], list(range(100, 120))]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
# Nothing divides evenly over four ranks: 99 dense columns, 2 KV groups.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dense": {"moe": False, "intermediate_size": 99},
    "moe": {"moe": True, "mlp_only_layers": [1], "intermediate_size": 99},
}
pytestmark = pytest.mark.usefixtures("nursery")


@dataclass(frozen=True)
class Family:
    """A checkpoint, its adapters `wide` and `narrow`, and what it generates with each merged into it."""

    base: Path
    lora: dict[str, str]
    merged: dict[str | None, list[RequestOutput]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    made = {}
    for kind, shape in CHECKPOINTS.items():
        folder = tmp_path_factory.mktemp(kind)
        base = write_checkpoint(folder / "base", **shape)
        # PEFT's own suffixes would reach the experts as well.
        everything = EVERYTHING if kind == "dense" else (*ATTENTION, "layers.1.mlp.down_proj")
        wide = write_adapter(folder / "wide", base, EVERYTHING, r=6, seed=1, target_modules=list(everything))
        narrow = write_adapter(
            folder / "narrow", base, ("q_proj", "v_proj"), r=3, seed=2, use_rslora=True, strength=0.3
        )
        checkpoints = {None: base, "wide": merge(folder / "wide+", base, wide)}
        checkpoints["narrow"] = merge(folder / "narrow+", base, narrow)
        merged = {}
        for name, path in checkpoints.items():
            with LLM(str(path), use_tqdm=False) as llm:
                merged[name] = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert len({str(outputs[0].token_ids) for outputs in merged.values()}) == 3
        made[kind] = Family(base, {"wide": str(wide), "narrow": str(narrow)}, merged)
    return made


def assert_equal(got: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        for one, other in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "layout", "settings"),
    [
        ("dense", "tp=1", {}),
        ("dense", "tp=1", {"block_size": 4, "num_blocks": 24}),  # where sequences are preempted
        ("dense", "tp=2", {}),
        ("dense", "tp=4", {}),  # replicates KV groups, pads columns
        ("dense", "pp=2", {}),
        ("dense", "dp=2", {}),
        ("moe", "tp=1", {}),
        ("moe", "tp=2,ep=2", {"moe_dispatch": "all_to_all"}),
        ("moe", "dp=2,ep=2", {}),
        ("moe", "tp=2,pp=2", {}),
    ],
)
def test_adapters_equal_merged_checkpoints_alone_and_mixed(
    families: dict[str, Family], kind: str, layout: str, settings: dict[str, Any]
) -> None:
    family = families[kind]
    # 16 tokens a step: chunks of prompts with one adapter beside decodes with another.
    settings = {"max_num_batched_tokens": 16, "use_tqdm": False, **settings}
    settings["executor"] = "in_process" if layout == "tp=1" else "processes"
    with LLM(str(family.base), layout=layout, lora=family.lora, **settings) as llm:
        for name, expected in family.merged.items():
            assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora=name), expected)
        names = [name for name in family.merged for _ in PROMPTS]
        mixed = llm.generate(PROMPTS * 3, GREEDY, use_tqdm=False, lora=names)
        llm._engine.check_integrity()
    assert_equal(mixed, [output for outputs in family.merged.values() for output in outputs])


def test_the_prefix_cache_is_each_adapters_own(families: dict[str, Family]) -> None:
    family = families["dense"]
    with LLM(str(family.base), lora=family.lora, block_size=4, use_tqdm=False) as llm:

        def cached(name: str | None) -> int:
            [output] = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False, lora=name)
            assert_equal([output], family.merged[name][:1])
            return output.num_cached_tokens

        assert [cached(name) for name in (None, "wide", "narrow")] == [0, 0, 0]
        assert [cached(name) for name in (None, "wide", "narrow")] == [36, 36, 36]


def test_guesses_are_right_with_the_adapter_that_makes_them(families: dict[str, Family]) -> None:
    family = families["dense"]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    with LLM(str(family.base), lora=family.lora, use_tqdm=False) as llm:
        plain = llm.generate(PROMPTS, params, use_tqdm=False, lora="wide")
    with LLM(str(family.base), lora=family.lora, speculative="ngram,min=1", use_tqdm=False) as llm:
        guessed = llm.generate(PROMPTS, params, use_tqdm=False, lora="wide")
        assert llm._engine.stats().accepted_tokens > 0
    assert [output.token_ids for output in guessed] == [output.token_ids for output in plain]


@pytest.mark.parametrize("settings", [{"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_a_rounded_base_takes_adapters(families: dict[str, Family], settings: dict[str, Any]) -> None:
    family, first = families["dense"], replace(GREEDY, max_tokens=1)
    with LLM(str(family.base), lora=family.lora, use_tqdm=False, **settings) as llm:
        for name, expected in family.merged.items():
            [output] = llm.generate(PROMPTS[:1], first, use_tqdm=False, lora=name)
            assert output.token_ids == expected[0].token_ids[:1]
            assert output.logprobs and expected[0].logprobs
            assert output.logprobs[0].logprob == pytest.approx(expected[0].logprobs[0].logprob, abs=0.1)


def test_no_graph_holds_a_step_in_which_some_group_has_an_adapter() -> None:
    spec = SampleSpec(0, 1, 0, 0, 1, None)
    plain = SequenceStep(0, 0, (7,), 0, (0,), spec)
    for adapter in (0, 1):
        plans = StepPlan.for_groups(1, [(plain,), (plain._replace(adapter=adapter),)])
        batches = [batch_of(plan) for plan in plans]
        assert [batch.decodes_only for batch in batches] == [not adapter] * 2
        assert [batch.adapters is not None for batch in batches] == [False, bool(adapter)]


def test_without_adapters_a_step_is_the_fused_one(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a step without adapters met one")

    family = families["dense"]
    monkeypatch.setattr(LowRank, "add", never)
    with LLM(str(family.base), lora=family.lora, use_tqdm=False) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), family.merged[None])


def test_a_row_meets_its_own_adapter_alone() -> None:
    torch.manual_seed(0)
    a, b, x = torch.randn(4, 3, 5), torch.randn(4, 3, 7), torch.randn(6, 5)
    a[1] = torch.inf
    for numbers in ([0, 3, 1, 0, 3, 4], [3, 3, 3, 3, 3, 3], [3, 0, 4, 0, 0, 0]):
        y = torch.zeros(6, 7)
        rows = AdapterRows.of(numbers, x.device)
        assert rows is not None
        LowRank(a, b).add(y, x, rows)
        for row, number in enumerate(numbers):
            expected = x[row] @ a[number - 1].T @ b[number - 1] if number else torch.zeros(7)
            assert torch.allclose(y[row], expected, atol=1e-5)
    assert AdapterRows.of([0, 0], x.device) is None


def test_an_unknown_adapter_is_refused_by_name(families: dict[str, Family]) -> None:
    family = families["dense"]
    with LLM(str(family.base), lora=family.lora, use_tqdm=False) as llm:
        with pytest.raises(
            RequestError, match=r"'other' is not a LoRA adapter here; .* wide, narrow"
        ) as refusal:
            llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora="other")
        assert (refusal.value.param, refusal.value.status) == ("model", 404)
        with pytest.raises(RequestError, match="2 adapters for 4 prompts"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora=["wide", None])


@pytest.mark.parametrize(
    "given",
    [
        "a=x,b=y/z",
        "a=x, b=y/z",
        {"a": "x", "b": "y/z"},
        ["a=x", "b=y/z"],
        [{"a": "x"}, {"b": "y/z"}],
        ["a=x,b=y/z"],
    ],
)
def test_adapters_are_named_in_yaml_and_on_the_command_line(given: Any) -> None:
    lora = read_settings(EngineConfig, {"lora": given}).lora
    assert lora.pairs == (("a", "x"), ("b", "y/z"))
    assert LoraAdapters.parse(str(lora)) == lora


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("a", "lora has 'a' where name=path is expected"),
        ("a=x,", "lora has '' where name=path is expected"),
        (7, "lora has 7 where"),
        ({"a": 7}, "lora has .* where name=path"),
        ("=x", "lora '' is not a valid name"),
        ("a b=x", "lora 'a b' is not a valid name"),
        ("a=", "lora a has '' where a path"),
        ({"a": "x,y"}, "lora a has 'x,y' where a path without commas"),
        (["a=x", "a=y"], "lora names a twice"),
    ],
)
def test_adapters_that_cannot_be_meant_are_named(given: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_settings(EngineConfig, {"lora": given})


LAYER = "base_model.model.model.layers.0"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"modules_to_save": 5}, "modules_to_save is 5 where a list of names is expected"),
        ({"target_modules": [3]}, "target_modules is .3. where a list of names is expected"),
        ({"use_rslora": "false"}, "use_rslora='false', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, r"has shape \[4, 64\] where .* make it \[8, 64\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 0}, "r=0 where a positive integer"),
        ({"lora_alpha": "x"}, "lora_alpha='x' where a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan where a number"),
        ({"target_modules": ["q_proj", "lm_head"]}, "targets 'lm_head'"),
        (
            {"target_modules": ["q_proj", "k_proj"]},
            "lacks base_model.model.model.layers.0.self_attn.k_proj.lora_A",
        ),
        ({"target_modules": "all-linear"}, "lacks base_model.model.model.layers.0.mlp.down_proj.lora_A"),
        ({"target_modules": r".*\.(q|v)_proj"}, "lacks .*layers.0.self_attn.v_proj.lora_A"),
        ({"target_modules": r".*\.lm_head"}, "targets .*lm_head"),
        ({"target_modules": "("}, r"target_modules='\('"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    families: dict[str, Family], tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    refused(
        families["dense"].base,
        write_adapter(tmp_path, families["dense"].base, ("q_proj",), **config),
        sentence,
    )


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("base_model.model.lm_head.lora_A.weight", [4, 64], "it changes lm_head.lora_A.weight; adapters may"),
        (
            f"{LAYER}.mlp.experts.0.up_proj.lora_A.weight",
            [4, 64],
            "it changes model.layers.0.mlp.experts.0.up",
        ),
        (f"{LAYER}.self_attn.q_proj.lora_magnitude_vector", [64], "it changes .*lora_magnitude_vector"),
        (
            f"{LAYER}.self_attn.q_proj.lora_A.weight",
            [5, 64],
            r"has shape \[5, 64\] where model and adapter_config.json make it \[4, 64\]",
        ),
        (f"{LAYER}.self_attn.q_proj.lora_B.weight", [64, 4], r"has shape \[64, 4\] where .* \[128, 4\]"),
        (
            f"{LAYER}.self_attn.k_proj.lora_A.weight",
            [4, 64],
            "lacks .*layers.0.self_attn.k_proj.lora_B.weight",
        ),
    ],
)
def test_a_tensor_that_is_amiss_is_named(
    families: dict[str, Family], tmp_path: Path, name: str, shape: list[int], sentence: str
) -> None:
    base = families["dense"].base
    file = write_adapter(tmp_path, base, ("q_proj",)) / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(shape)}, file)
    refused(base, tmp_path, sentence)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], None])
def test_an_adapter_without_a_tensor_is_refused(
    families: dict[str, Family], tmp_path: Path, targets: Any
) -> None:
    base = families["dense"].base
    write_adapter(tmp_path, base, (), target_modules=targets)
    refused(base, tmp_path, "holds no tensor")


def test_weights_beside_an_adapters_file_are_not_the_adapters(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["dense"]
    shutil.copytree(family.lora["narrow"], tmp_path, dirs_exist_ok=True)
    shutil.copy(family.base / "model.safetensors", tmp_path)
    [(name, path)] = LoraAdapters.parse(f"mine={tmp_path}").pairs
    config = ModelConfig.from_directory(family.base)
    assert Adapter.open(name, path, config).pairs == Adapter.open("n", family.lora["narrow"], config).pairs


def test_a_directory_that_holds_no_adapter_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    base = families["dense"].base
    refused(base, tmp_path / "nowhere", "neither a directory that exists nor")
    refused(base, tmp_path, "has no adapter_config.json")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    refused(base, tmp_path, "holds no adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(base, tmp_path, "cannot be read as JSON")


def refused(base: Path, adapter: Path, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=f"the adapter mine cannot be used: .*{sentence}"):
        LLM(str(base), lora=f"mine={adapter}", use_tqdm=False)
