"""Quantised checkpoints: each layout gives what the reference gives with the weights that the codes stand for."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.model.finalize import finalize
from qwen3_dist.model.reference import load_reference
from qwen3_dist.ops.cpu.ops import CpuOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.outputs import RequestOutput
from qwen3_dist.weights.loader import load_model
from tests.adapters import EVERYTHING, merge, write_adapter
from tests.quantized import Twins, edit_config, write_channels, write_fp8

PROMPTS = [list(range(3, 40)), [7, 1, 150, 198, 0], [42]]
FP8 = torch.float8_e4m3fn
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3)
pytestmark = pytest.mark.usefixtures("nursery")
# Nothing divides evenly, and blocks of 24 x 20 lie across heads of 16 and the parts of every layout.
ODD: dict[str, Any] = {
    "num_hidden_layers": 2,
    "intermediate_size": 99,
    "moe_intermediate_size": 45,
    "num_experts": 6,
    "mlp_only_layers": [1],
}
DENSE: dict[str, Any] = {"moe": False, "num_hidden_layers": 2, "intermediate_size": 99}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, "tie_word_embeddings": True},
    "dense in parts": {
        **DENSE,
        "attention_bias": True,
        "alone": ("layers.0.self_attn.k_proj", "layers.1.mlp"),
    },
    "moe": {"moe": True, **ODD},
    "fused": {"moe": True, "stacks": True, **ODD, "alone": ("layers.0.self_attn.o_proj",)},
    "3 KV groups": {"moe": True, **ODD, "num_attention_heads": 6, "num_key_value_heads": 3},
}
CHANNELS: dict[str, dict[str, Any]] = {
    "outputs": {"moe": True, **ODD},
    "tensors": {**DENSE, "whole": True},
    "int8 outputs": {"moe": True, **ODD, "int8": True},
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twins]:
    made = {}
    for kind, shape in SHAPES.items():
        made[kind] = write_fp8(tmp_path_factory.mktemp("fp8"), 24, 20, **shape)
    for kind, shape in CHANNELS.items():
        made[kind] = write_channels(tmp_path_factory.mktemp("channels"), **shape)
    return made


@functools.cache
def answers_of_reference(plain: Path) -> list[tuple[list[int], Tensor]]:
    """Each prompt's greedy tokens and their log-probabilities."""
    reference = load_reference(plain)
    answers = []
    for prompt in PROMPTS:
        ids = reference.generate_greedy(prompt, 6)
        logits = reference(torch.tensor(prompt + ids))[len(prompt) - 1 : -1]
        answers.append((ids, logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]))
    return answers


def engine(path: Path, layout: str, **settings: Any) -> LLM:
    executor = "in_process" if layout == "tp=1" else "processes"
    common = {"max_num_batched_tokens": 16, "num_blocks": 16, "dtype": "float32", "use_tqdm": False}
    return LLM(str(path), layout=layout, executor=executor, **{**common, **settings})


def assert_equal(outputs: list[RequestOutput], plain: Path) -> None:
    for output, (ids, logprobs) in zip(outputs, answers_of_reference(plain), strict=True):
        assert output.token_ids == ids
        got = torch.tensor([entry.logprob for entry in output.logprobs or []])
        assert torch.allclose(got, logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", "tp=1"),
        ("dense", "tp=4"),  # replicates KV groups
        ("dense in parts", "tp=1"),
        ("moe", "tp=1"),
        ("moe", "tp=4"),  # cuts each expert in 4
        ("moe", "tp=2,dp=2,ep=2"),
        ("fused", "tp=2"),
        ("3 KV groups", "tp=3"),
        ("outputs", "tp=1"),
        ("tensors", "tp=2"),
        ("int8 outputs", "tp=1"),
        ("int8 outputs", "tp=2,ep=2"),
    ],
)
def test_every_layout_computes_with_the_weights_that_the_codes_stand_for(
    twins: dict[str, Twins], kind: str, layout: str
) -> None:
    with engine(twins[kind].quantized, layout) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins[kind].plain)


@pytest.mark.parametrize(("kind", "fused"), [("dense", True), ("moe", True), ("dense in parts", False)])
def test_weights_stay_codes_in_memory(twins: dict[str, Twins], kind: str, fused: bool) -> None:
    path, alone = twins[kind].quantized, ParallelContext.single()
    model = load_model(path, ModelConfig.from_directory(path), alone, torch.float32, torch.device("cpu"))
    out = model.blocks[0].att.out_proj
    assert out.weight.dtype == FP8 and out.get_parameter("weight_scale").shape == (3, 7)
    finalize(model)
    assert not list(out.parameters()) or kind == "dense in parts"  # biases
    if isinstance(model.ops, CpuOps):
        assert out.weights.parts[0].weight.dtype == FP8
        assert (model.whole_stage is not None) == fused  # by one kernel, if all its weights are of one dtype


def test_adapters_apply_to_quantised_weights(twins: dict[str, Twins], tmp_path: Path) -> None:
    quantized, plain = twins["dense"]
    adapter = write_adapter(tmp_path / "adapter", plain, EVERYTHING, r=3)
    merged = merge(tmp_path / "merged", plain, adapter)
    with engine(quantized, "tp=2", lora={"some": str(adapter)}) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora="some"), merged)
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), plain)


def test_scales_move_with_their_experts(twins: dict[str, Twins]) -> None:
    with engine(twins["moe"].quantized, "tp=2,ep=2", redundant_experts=2) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins["moe"].plain)
        assert llm.rebalance_experts(), "no layer was worth moving, so nothing was tested"
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins["moe"].plain)


def test_deterministic_layouts_give_the_same_bits(twins: dict[str, Twins]) -> None:
    answers = []
    for layout, tokens in (("tp=1", 32), ("tp=2", 40)):  # of experts' columns and of a dense layer's
        settings = {"deterministic": True, "dtype": "bfloat16", "max_num_batched_tokens": tokens}
        with engine(twins["moe"].quantized, layout, **settings) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        answers.append([(output.token_ids, output.logprobs) for output in outputs])
    assert answers[0] == answers[1]


def test_weights_in_bf16_are_rounded_once(twins: dict[str, Twins]) -> None:
    first = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    tops = []
    for path in twins["moe"]:
        with engine(path, "tp=1", dtype="bfloat16") as llm:
            [output] = llm.generate(PROMPTS[:1], first, use_tqdm=False)
        tops.append(dict(output.logprobs[0].top) if output.logprobs else {})
    assert tops[0] == pytest.approx(tops[1], abs=0.05)


def test_random_weights_of_a_quantised_shape_do_not_depend_on_the_layout(twins: dict[str, Twins]) -> None:
    answers = []
    for layout in ("tp=1", "tp=2"):
        with engine(twins["moe"].quantized, layout, load_format="random") as llm:
            answers.append([output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)])
    assert answers[0] == answers[1]


def changed(twins: Twins, path: Path, changes: dict[str, Tensor | None]) -> Path:
    """A copy of the quantised checkpoint with some tensors replaced, added or, for None, removed."""
    tensors = {**load_file(twins.quantized / "model.safetensors"), **changes}
    path.mkdir()
    (path / "config.json").write_text((twins.quantized / "config.json").read_text())
    save_file(
        {n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors", {"format": "pt"}
    )
    return path


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{Q}_scale_inv": None}, f"the scale of {Q} is missing; download the weights"),
        ({f"{Q}_scale_inv": torch.full((6, 4), torch.nan)}, f"{Q}_scale_inv has a scale that is not finite"),
        (
            {f"{Q}_scale_inv": torch.ones(6, 3)},
            r"_inv has shape \[6, 3\] where config.json makes it \[6, 4\]; download the weights",
        ),
        (
            {f"{Q}_scale_inv": torch.ones(6, 4).to(FP8)},
            f"{Q}_scale_inv in .* is stored as F8_E4M3; float32 is",
        ),
        ({Q: torch.zeros(128, 64)}, f"{Q} in .* is stored as F32; float8_e4m3fn is expected"),
        ({"model.norm.weight": torch.ones(64).to(FP8)}, "model.norm.weight in .* as F8_E4M3; use a bf16"),
        (
            {"model.layers.0.mlp.gate_proj.odd_scale": torch.ones(1)},
            "holds 1 tensor .model.layers.0.mlp.gate_proj",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(
    twins: dict[str, Twins], tmp_path: Path, changes: dict[str, Tensor | None], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        engine(changed(twins["dense"], tmp_path / "damaged", changes), "tp=1")


def test_scales_of_activations_and_caches_are_not_needed(twins: dict[str, Twins], tmp_path: Path) -> None:
    names = ("q_proj.input_scale", "q_proj.input_zero_point", "o_proj.output_scale", "k_scale")
    unused = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in names}
    path = changed(twins["dense"], tmp_path / "static", unused)
    with engine(path, "tp=1") as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins["dense"].plain)


def test_a_scale_of_the_cache_without_a_number_is_named(twins: dict[str, Twins], tmp_path: Path) -> None:
    empty = {"model.layers.0.self_attn.k_scale": torch.empty(0)}
    with pytest.raises(CheckpointError, match="k_scale has a scale that is not positive"):
        engine(changed(twins["tensors"], tmp_path / "empty", empty), "tp=1", kv_cache_dtype="fp8")


def test_experts_of_several_formats_are_refused(twins: dict[str, Twins], tmp_path: Path) -> None:
    down = "model.layers.0.mlp.experts.3.down_proj"
    changes = {f"{down}.weight": torch.zeros(64, 45), f"{down}.weight_scale_inv": None}
    path = changed(twins["moe"], tmp_path / "mixed", changes)
    alone = {
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": [24, 20],
            "ignored_layers": [down],
        }
    }
    edit_config(path, **alone)
    with pytest.raises(CheckpointError, match=f"{down}.weight is not stored as other weights"):
        engine(path, "tp=1")


def test_scales_may_be_powers_of_two_in_one_byte(twins: dict[str, Twins], tmp_path: Path) -> None:
    scales = load_file(twins["dense"].quantized / "model.safetensors")
    powers = {n: t.float().log2().round().exp2() for n, t in scales.items() if n.endswith("_scale_inv")}
    narrow = {name: power.to(torch.float8_e8m0fnu) for name, power in powers.items()}
    answers = []
    for number, changes in enumerate((powers, narrow)):
        with engine(changed(twins["dense"], tmp_path / str(number), changes), "tp=1") as llm:
            answers.append([output.logprobs for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)])
    assert answers[0] == answers[1]


def test_fp8_of_modelopt_is_told_by_a_file_beside_config_json(
    twins: dict[str, Twins], tmp_path: Path
) -> None:
    stored = load_file(twins["tensors"].quantized / "model.safetensors")
    scales = {name: scale.view(()) for name, scale in stored.items() if name.endswith("weight_scale")}
    path = changed(twins["tensors"], tmp_path / "modelopt", {**stored, **scales})
    edit_config(path, quantization_config=None)
    told = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    file = path / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": told}))
    with engine(path, "tp=2") as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins["tensors"].plain)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json does not tell a quantisation"):
        engine(path, "tp=1")


@pytest.mark.parametrize(("listed", "alone"), [(["p_proj"], ("up_proj",)), (["mlp"], ())])
def test_tensors_decide_where_a_list_is_read_by_another_rule(
    tmp_path: Path, listed: list[str], alone: tuple[str, ...]
) -> None:
    """transformers takes names in lists as regular expressions and as ends of names, and vLLM takes whole names."""
    twins = write_fp8(tmp_path, 24, 20, **SHAPES["dense"], alone=alone)
    config = json.loads((twins.quantized / "config.json").read_text())["quantization_config"]
    edit_config(twins.quantized, quantization_config={**config, "modules_to_not_convert": listed})
    with engine(twins.quantized, "tp=1") as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins.plain)


def test_rounding_quantised_weights_again_is_refused(twins: dict[str, Twins]) -> None:
    with pytest.raises(
        ConfigError, match="quantize=int8 rounds .* quantised already .fp8.; leave quantize out"
    ):
        engine(twins["dense"].quantized, "tp=1", quantize="int8")
