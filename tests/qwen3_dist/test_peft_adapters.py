"""Adapters that PEFT itself has written (tests/data/peft) give what PEFT's model gives, or are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.adapter_files import Adapter
from tests.data.peft.write import FOLDER, PROMPT, USED, base

pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The model without experts and the one with them."""
    folders = {moe: tmp_path_factory.mktemp(f"base{moe}") for moe in (False, True)}
    for moe, folder in folders.items():
        base(moe).save_pretrained(folder)
    return folders


# Layouts with ranks that share an expert's columns, that exchange tokens, and that have experts alone.
LAYOUTS: list[tuple[bool, str, dict[str, Any]]] = [
    (False, "tp=1", {}),
    (False, "tp=2", {}),
    (True, "tp=1", {}),
    (True, "tp=2", {"moe_dispatch": "all_to_all"}),
    (True, "tp=2,ep=2", {"moe_dispatch": "all_gather"}),
    (True, "tp=2,ep=2", {"moe_dispatch": "all_to_all"}),
    (True, "dp=2,ep=2", {"moe_dispatch": "all_gather"}),
    (True, "dp=2,ep=2", {"moe_dispatch": "all_to_all", "deterministic": True}),
    (True, "tp=2", {"deterministic": True}),
    (True, "tp=2,dp=2,ep=2", {"moe_dispatch": "all_to_all"}),
    (True, "tp=2,pp=2,ep=2", {}),
]


@pytest.mark.parametrize(("moe", "layout", "settings"), LAYOUTS)
def test_logprobs_are_those_of_peft(
    bases: dict[bool, Path], moe: bool, layout: str, settings: dict[str, Any]
) -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert expected.keys() == USED.keys()
    names = [name for name in USED if USED[name] == moe]
    lora: Any = {name: str(FOLDER / name) for name in names}
    settings = {"executor": "in_process" if layout == "tp=1" else "processes", **settings}
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    settings |= {"dtype": "float32", "num_blocks": 64, "use_tqdm": False}
    with LLM(str(bases[moe]), layout=layout, lora=lora, **settings) as llm:
        outputs = llm.generate([PROMPT] * len(names), params, use_tqdm=False, lora=names)
    for name, output in zip(names, outputs, strict=True):
        assert output.prompt_logprobs is not None
        found = [each.logprob for each in output.prompt_logprobs[1:] if each is not None]
        assert found == pytest.approx(expected[name], abs=1e-4), name


def test_whole_modules_that_are_no_routers_are_refused_with_a_way_out(bases: dict[bool, Path]) -> None:
    sentence = r"it holds the whole of norm \(modules_to_save=\['norm'\]\), .*PEFT's merge_and_unload"
    with pytest.raises(CheckpointError, match=f"the adapter mine cannot be used: {sentence}"):
        Adapter.open("mine", str(FOLDER / "saved"), ModelConfig.from_directory(bases[False]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rank_pattern": {"v_proj": 2}},
            r"v_proj.lora_A.weight has shape \[3, 32\] where .* make it \[2, 32\]",
        ),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern={'\(': 2}, which is no object of patterns"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\], which is no object of patterns"),
        ({"rank_pattern": {"v_proj": 0}}, "r=0 where a positive integer"),
        ({"kasa_config": {"beta": 1}}, "has kasa_config={'beta': 1}, which is not supported"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(
    bases: dict[bool, Path], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    shutil.copytree(FOLDER / "patterns", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=sentence):
        Adapter.open("mine", str(tmp_path), ModelConfig.from_directory(bases[False]))


def test_a_pickled_adapter_is_told_how_to_become_one(bases: dict[bool, Path], tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "rslora", tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"but a pickle, .*; load the adapter with PEFT and save it again"
    ):
        Adapter.open("mine", str(tmp_path), ModelConfig.from_directory(bases[False]))


def test_weights_do_not_change_under_a_router_that_an_adapter_holds(bases: dict[bool, Path]) -> None:
    """It is kept as its difference to the model's own router."""
    lora = {"saved_router": str(FOLDER / "saved_router")}
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(str(bases[True]), dtype="float32", num_blocks=64, use_tqdm=False, lora=lora) as llm:
        before = llm.generate(PROMPT, params, use_tqdm=False, lora="saved_router")[0].token_ids
        with pytest.raises(
            CheckpointError, match="unload the adapter, change the weights, and load it again"
        ):
            llm.update_weights(str(bases[True]), "same")
        assert llm.generate(PROMPT, params, use_tqdm=False, lora="saved_router")[0].token_ids == before
