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


@pytest.mark.parametrize("layout", ["tp=1", "tp=2"])
def test_logprobs_are_those_of_peft(bases: dict[bool, Path], layout: str) -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert expected.keys() == USED.keys()
    lora: Any = {name: str(FOLDER / name) for name in USED}
    form = "in_process" if layout == "tp=1" else "processes"
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    settings: dict[str, Any] = {"dtype": "float32", "num_blocks": 32, "use_tqdm": False}
    with LLM(str(bases[False]), layout=layout, executor=form, lora=lora, **settings) as llm:
        outputs = llm.generate([PROMPT] * len(USED), params, use_tqdm=False, lora=list(USED))
    for name, output in zip(USED, outputs, strict=True):
        assert output.prompt_logprobs is not None
        found = [each.logprob for each in output.prompt_logprobs[1:] if each is not None]
        assert found == pytest.approx(expected[name], abs=1e-4), name


@pytest.mark.parametrize(
    ("name", "moe", "sentence"),
    [
        ("saved", False, r"it holds whole modules \(modules_to_save=\['norm'\]\); adapters may change the q, k"),
        ("parameters", True, r"it changes parameters \(target_parameters=.*gate_up_proj.*\); .* no experts or rout"),
        ("moe_all_linear", True, r"it changes parameters \(target_parameters=.*gate.weight.*PEFT's merge_and_unload"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_with_a_way_out(
    bases: dict[bool, Path], name: str, moe: bool, sentence: str
) -> None:
    config = ModelConfig.from_directory(bases[moe])
    with pytest.raises(CheckpointError, match=f"the adapter mine cannot be used: {sentence}"):
        Adapter.open("mine", str(FOLDER / name), config)


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
