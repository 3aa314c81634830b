"""Adapters of experts and routers equal checkpoints into which they are merged, in every layout, as experts move and
as adapters come and go. `test_peft_adapters` has the layouts of their files."""

from __future__ import annotations

import asyncio
import itertools
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
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import CheckpointError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.model.expert_lora import ExpertLowRank
from qwen3_dist.protocol.outputs import RequestOutput
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.adapter_files import Adapter
from tests.adapters import EVERYTHING, merge, write_adapter
from tests.checkpoints import write_checkpoint
from tests.data.peft.write import FOLDER
from tests.data.peft.write import base as peft_base

PROMPTS = [list(range(3, 40)), [7, 1, 150, 198, 0], [42], list(range(100, 120))]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
# Nothing divides evenly over two ranks: 45 columns of an expert, 7 experts.
SHAPE: dict[str, Any] = {"moe_intermediate_size": 45, "num_experts": 7, "num_experts_per_tok": 3}
_ids = map(str, itertools.count())
pytestmark = pytest.mark.usefixtures("nursery")
Outputs = dict[str | None, list[RequestOutput]]


@dataclass(frozen=True)
class Family:
    base: Path
    lora: dict[str, str]
    merged: Outputs  # with each adapter merged into the checkpoint


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("experts")
    base = write_checkpoint(folder / "base", moe=True, mlp_only_layers=[1], **SHAPE)
    adapters = {
        "all": write_adapter(folder / "all", base, (*EVERYTHING, "gate"), r=5, seed=1, experts=True),
        "down": write_adapter(
            folder / "down", base, ("down_proj",), r=2, seed=2, experts=True, use_rslora=True
        ),
        "some": write_adapter(folder / "some", base, ("q_proj",), r=3, seed=3),  # of no expert
    }
    merged: Outputs = {}
    for name, adapter in {None: None, **adapters}.items():
        path = merge(folder / f"{name}+", base, adapter) if adapter else base
        with LLM(str(path), use_tqdm=False) as llm:
            merged[name] = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert len({str(outputs[0].token_ids) for outputs in merged.values()}) == 4
    return Family(base, {name: str(path) for name, path in adapters.items()}, merged)


def assert_equal(got: list[RequestOutput], expected: list[RequestOutput], within: float = 1e-4) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        for one, other in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=within)


def check(llm: LLM, family: Family) -> None:
    """Each adapter alone, and all in one batch."""
    names = [*family.merged]
    for name in names:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora=name), family.merged[name])
    of_each = [name for name in names for _ in PROMPTS]
    mixed = llm.generate(PROMPTS * len(names), GREEDY, use_tqdm=False, lora=of_each)
    assert_equal(mixed, [output for name in names for output in family.merged[name]])


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("tp=1", {}),
        ("tp=2", {}),
        ("tp=2,ep=2", {"moe_dispatch": "all_to_all"}),
        ("dp=2,ep=2", {"moe_dispatch": "all_gather"}),
        ("dp=2", {"moe_dispatch": "all_to_all"}),  # an expert's columns are split over dp groups
        ("tp=2,dp=2,ep=2", {"moe_dispatch": "all_to_all"}),
        ("dp=2,pp=2,ep=2", {"moe_dispatch": "all_to_all", "deterministic": True}),
    ],
)
def test_adapters_of_experts_equal_merged_checkpoints(
    family: Family, layout: str, settings: dict[str, Any]
) -> None:
    settings = {"executor": "in_process" if layout == "tp=1" else "processes", **settings}
    with LLM(
        str(family.base),
        layout=layout,
        lora=family.lora,
        max_num_batched_tokens=16,
        use_tqdm=False,
        **settings,
    ) as llm:
        check(llm, family)


@pytest.mark.parametrize("settings", [{"quantize": "int8"}, {"dtype": "bfloat16"}, {"quantize": "fp8"}])
def test_rounded_experts_take_adapters(family: Family, settings: dict[str, Any]) -> None:
    """They change a rounded model by as much as the model that is not rounded."""
    first = replace(GREEDY, max_tokens=1, prompt_logprobs=0, logprobs=None)

    def changes(**more: Any) -> torch.Tensor:
        with LLM(str(family.base), lora=family.lora, use_tqdm=False, **more) as llm:
            found = []
            for name in (None, "all"):
                [output] = llm.generate(PROMPTS[:1], first, use_tqdm=False, lora=name)
                found.append(
                    torch.tensor([each.logprob for each in (output.prompt_logprobs or [])[1:] if each])
                )
        return found[1] - found[0]

    exact, rounded = changes(), changes(**settings)
    assert (rounded - exact).norm() < 0.35 * exact.norm()


def test_adapters_move_with_their_experts(family: Family, tmp_path: Path) -> None:
    lora = {**family.lora, "all": str(shutil.copytree(family.lora["all"], tmp_path / "all"))}
    settings = {"layout": "tp=2,ep=2", "executor": "processes", "redundant_experts": 3, "use_tqdm": False}
    with LLM(str(family.base), lora=lora, **settings) as llm:
        check(llm, family)
        llm.generate([[9] * 60] * 8, GREEDY, use_tqdm=False)  # which the same few experts compute
        assert llm.rebalance_experts(), "no layer was worth moving, so nothing was tested"
        check(llm, family)
        (tmp_path / "all/adapter_model.safetensors").touch()
        llm.generate([[77] * 60] * 16, GREEDY, use_tqdm=False)
        with pytest.raises(CheckpointError, match=r"could not be moved: .* has changed since it was loaded"):
            llm.rebalance_experts()
        check(llm, family)


@pytest.mark.parametrize("layout", ["tp=1", "dp=2,ep=2"])
def test_adapters_of_experts_come_and_go(family: Family, layout: str) -> None:
    expected = {name: list(outputs[0].token_ids) for name, outputs in family.merged.items()}

    async def ask(engine: AsyncEngine, name: str | None) -> None:
        steps = engine.generate(PROMPTS[0], GREEDY, next(_ids), lora=name)
        found = [
            token for step in [step async for step in steps] for delta in step for token in delta.token_ids
        ]
        assert found == expected[name]

    async def use(engine: AsyncEngine, *names: str) -> None:
        await engine.use_adapters(LoraAdapters(tuple((name, family.lora[name]) for name in names)))
        for _ in range(2):  # both groups of dp=2 answer
            await asyncio.gather(*(ask(engine, name) for name in (*names, None, *names)))

    async def run() -> None:
        engine = AsyncEngine(EngineConfig(model=str(family.base), layout=layout, executor="processes"))
        try:
            for names in (("down",), ("all", "down"), ("some", "all"), ("some",), ()):
                await use(engine, *names)
        finally:
            engine.shutdown()

    asyncio.run(run())


def test_without_adapters_of_experts_their_steps_are_the_fused_ones(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a step without adapters of experts met one")

    monkeypatch.setattr(ExpertLowRank, "add", never)
    with LLM(str(family.base), lora=family.lora, use_tqdm=False) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), family.merged[None])
    with LLM(str(family.base), lora={"some": family.lora["some"]}, use_tqdm=False) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora="some"), family.merged["some"])


LAYER = "base_model.model.model.layers.0.mlp"


@pytest.mark.parametrize(
    ("adapter", "config", "tensors", "sentence"),
    [
        ("parameters", {"r": 3}, {}, r"experts.lora_A.weight has shape \[8, 24\] where .* make it \[12, 24\]"),
        ("parameters", {"target_parameters": ["experts.bias"]}, {}, "targets the parameter 'experts.bias'"),
        ("gate_up", {"target_parameters": ["gate_up_proj", "down_proj"]}, {}, "lacks .*mlp.experts.down_proj"),
        (
            "parameters",
            {},
            {f"{LAYER}.experts.lora_A.weight": (8, 25)},
            r"have shapes \[8, 25\] and \[32, 8\], which fit neither",
        ),
        ("parameters", {}, {f"{LAYER}.experts.lora_B.weight": None}, "lacks .*layers.0.mlp.experts.lora_B.weight"),
        (
            "parameters",
            {},
            {f"{LAYER}.experts.lora_A.weight": (8, 32), f"{LAYER}.experts.lora_B.weight": (48, 8)},
            "both change .*layers.0.mlp.experts.gate_up_proj",
        ),
        ("single", {}, {f"{LAYER}.experts.2.up_proj.lora_B.weight": None}, "lacks .*experts.2.up_proj.lora_B.weight"),
        ("single", {}, {f"{LAYER}.experts.4.up_proj.lora_B.weight": (24, 2)}, "it changes .*experts.4.up_proj.lora_B"),
        ("single", {}, {f"{LAYER}.experts.up_proj.lora_A.weight": (4, 2, 32)}, "it changes .*experts.up_proj.lora_A"),
        ("saved_router", {}, {f"{LAYER}.gate.weight": None}, "lacks .*layers.0.mlp.gate.weight"),
        ("saved_router", {}, {f"{LAYER}.gate.weight": (5, 32)}, r"gate.weight has shape \[5, 32\] where"),
        ("saved_router", {"modules_to_save": ["gate", "lm_head"]}, {}, "holds the whole of lm_head"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, adapter: str, config: dict[str, Any], tensors: dict[str, Any], sentence: str
) -> None:
    peft_base(moe=True).save_pretrained(tmp_path / "base")
    folder = shutil.copytree(FOLDER / adapter, tmp_path / adapter)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    file = folder / "adapter_model.safetensors"
    changed = {name: torch.zeros(shape) for name, shape in tensors.items() if shape is not None}
    save_file(
        {
            name: each
            for name, each in {**load_file(file), **changed}.items()
            if tensors.get(name, 0) is not None
        },
        file,
    )
    with pytest.raises(CheckpointError, match=f"the adapter mine cannot be used: .*{sentence}"):
        Adapter.open("mine", str(folder), ModelConfig.from_directory(tmp_path / "base"))
