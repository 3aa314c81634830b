"""Checkpoints with packed codes: each layout gives what the reference gives with the weights that the codes stand
for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.planning.memory import rank_bytes
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError, EngineDeadError
from qwen3_dist.layout import Layout
from qwen3_dist.model.finalize import finalize
from qwen3_dist.ops.cpu.ops import CpuOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.weights.loader import load_model
from tests.adapters import EVERYTHING, merge, write_adapter
from tests.quantized import Twins
from tests.quantized_packed import write_awq, write_fp4, write_gptq, write_pack_quantized
from tests.qwen3_dist.test_quantized import DENSE, GREEDY, ODD, PROMPTS, assert_equal, changed, engine

pytestmark = pytest.mark.usefixtures("nursery")
KINDS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, "size": 20, "attention_bias": True},
    "zeros": {"moe": True, **ODD, "zeros": True},
    "order": {"moe": True, **ODD, "size": 10, "order": True, "zeros": True},
    "outputs": {**DENSE, "size": None, "zeros": True},
    "awq": {
        "write": write_awq,
        "moe": True,
        **ODD,
        "num_attention_heads": 8,
        "alone": ("layers.0.self_attn.k_proj",),
    },
    "gptq": {"write": write_gptq, **DENSE, "tie_word_embeddings": True},
    "gptq order": {"write": write_gptq, "moe": True, **ODD, "sym": False, "order": True},
    "gptq 8 bits": {"write": write_gptq, **DENSE, "bits": 8, "sym": False, "v2": True, "size": 20},
    "nvfp4": {"write": write_fp4, "moe": True, **ODD},
    "modelopt": {"write": write_fp4, "kind": "modelopt", **DENSE, "alone": ("layers.1.mlp",)},
    "mxfp4": {"write": write_fp4, "kind": "mxfp4", "moe": True, **ODD},
    "fused": {"moe": True, **ODD, "stacks": True},
    "fused zeros": {"moe": True, **ODD, "moe_intermediate_size": 48, "stacks": True, "zeros": True},
    "fused nvfp4": {"write": write_fp4, "moe": True, **ODD, "stacks": True},
    "fused modelopt": {"write": write_fp4, "kind": "modelopt", "moe": True, **ODD, "stacks": True},
    "fused mxfp4": {"write": write_fp4, "kind": "mxfp4", "moe": True, **ODD, "stacks": True},
    "8 bits": {
        "moe": True,
        **ODD,
        "bits": 8,
        "size": 12,
        "zeros": True,
        "alone": ("layers.0.self_attn.k_proj",),
    },
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twins]:
    made = {}
    for kind, shape in KINDS.items():
        rest = {**shape}
        write = rest.pop("write", write_pack_quantized)
        made[kind] = write(tmp_path_factory.mktemp("packed"), **rest)
    return made


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", "tp=1"),
        ("dense", "tp=4"),
        ("dense", "pp=2"),
        ("zeros", "tp=1"),
        ("zeros", "tp=4"),  # cuts each expert in 4, and so bytes of two codes
        ("zeros", "tp=2,dp=2,ep=2"),
        ("order", "tp=1"),
        ("order", "tp=4"),
        ("order", "tp=2,ep=2"),
        ("outputs", "tp=2"),
        ("awq", "tp=1"),
        ("awq", "tp=4"),
        ("awq", "tp=2,ep=2"),
        ("gptq", "tp=1"),
        ("gptq", "tp=4"),
        ("gptq order", "tp=1"),
        ("gptq order", "tp=4"),
        ("gptq 8 bits", "tp=2"),
        ("nvfp4", "tp=1"),
        ("nvfp4", "tp=4"),
        ("modelopt", "tp=2"),
        ("mxfp4", "tp=1"),
        ("mxfp4", "tp=2,ep=2"),
        ("fused", "tp=2,dp=2,ep=2"),
        ("fused zeros", "tp=4"),
        ("fused nvfp4", "tp=1"),
        ("fused nvfp4", "tp=2,ep=2"),
        ("fused modelopt", "tp=4"),
        ("fused mxfp4", "tp=2"),
        ("8 bits", "tp=1"),
        ("8 bits", "tp=2"),
    ],
)
def test_every_layout_computes_with_the_weights_that_the_codes_stand_for(
    twins: dict[str, Twins], kind: str, layout: str
) -> None:
    with engine(twins[kind].quantized, layout) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins[kind].plain)


@pytest.mark.parametrize("kind", ["zeros", "order", "nvfp4"])
def test_codes_of_4_bits_stay_two_in_a_byte(twins: dict[str, Twins], kind: str) -> None:
    path, alone = twins[kind].quantized, ParallelContext.single()
    config = ModelConfig.from_directory(path)
    model = load_model(path, config, alone, torch.float32, torch.device("cpu"))
    loaded = sum(tensor.nbytes for tensor in model.parameters())
    assert model.blocks[0].att.out_proj.weight.shape == (64, 64)  # of 128 inputs
    assert rank_bytes(config, Layout(), 0) == loaded
    finalize(model)
    if isinstance(model.ops, CpuOps):
        assert model.blocks[0].att.out_proj.weights.parts[0].weight.dtype == torch.uint8
        assert model.whole_stage is not None


@pytest.mark.parametrize("kind", ["nvfp4", "modelopt"])
def test_fused_experts_may_share_the_scale_of_their_tensor(tmp_path: Path, kind: str) -> None:
    """A number for each expert instead of one for its gate and one for its up: [E] and [E, 1]."""
    twins = write_fp4(tmp_path, kind, moe=True, **ODD, stacks=True)
    plain, quantized = (load_file(path / "model.safetensors") for path in (twins.plain, twins.quantized))
    for name in [
        each for each in quantized if "gate_up_proj" in each and each.endswith(("global_scale", "scale_2"))
    ]:
        ratio = quantized[name][:, 1:] / quantized[name][:, :1]
        shared = quantized[name][:, 0] if kind == "modelopt" else quantized[name][:, :1]
        quantized[name] = shared.contiguous()
        weight = plain[name.partition("gate_up_proj")[0] + "gate_up_proj"]
        inner = weight.shape[1] // 2
        weight[:, inner:] *= (ratio if kind == "nvfp4" else 1 / ratio)[..., None]
    for path, tensors in ((twins.plain, plain), (twins.quantized, quantized)):
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with engine(twins.quantized, "tp=2,ep=2") as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins.plain)


def test_adapters_apply_to_packed_weights(twins: dict[str, Twins], tmp_path: Path) -> None:
    quantized, plain = twins["gptq"]
    adapter = write_adapter(tmp_path / "adapter", plain, EVERYTHING, r=3)
    merged = merge(tmp_path / "merged", plain, adapter)
    with engine(quantized, "tp=2", lora={"some": str(adapter)}) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora="some"), merged)
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), plain)


@pytest.mark.parametrize("kind", ["zeros", "gptq order", "fused nvfp4"])
def test_zeros_and_orders_move_with_their_experts(twins: dict[str, Twins], kind: str) -> None:
    with engine(twins[kind].quantized, "tp=2,ep=2", redundant_experts=2) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins[kind].plain)
        assert llm.rebalance_experts(), "no layer was worth moving, so nothing was tested"
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins[kind].plain)


@pytest.mark.parametrize("kind", ["zeros", "8 bits"])
def test_deterministic_layouts_give_the_same_bits(twins: dict[str, Twins], kind: str) -> None:
    answers = []
    for layout, tokens in (("tp=1", 32), ("tp=2", 40)):
        settings = {"deterministic": True, "dtype": "bfloat16", "max_num_batched_tokens": tokens}
        with engine(twins[kind].quantized, layout, **settings) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        answers.append([(output.token_ids, output.logprobs) for output in outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["zeros", "gptq order", "mxfp4"])
def test_random_weights_of_a_packed_shape_do_not_depend_on_the_layout(
    twins: dict[str, Twins], kind: str
) -> None:
    answers = []
    for layout in ("tp=1", "tp=2"):
        with engine(twins[kind].quantized, layout, load_format="random") as llm:
            answers.append([output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)])
    assert answers[0] == answers[1]


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (
            "dense",
            {f"{Q}.weight_packed": torch.zeros(128, 7).int()},
            r"_packed has shape \[128, 7\] where .* \[128, 8\]",
        ),
        (
            "dense",
            {f"{Q}.weight_packed": torch.zeros(128, 8)},
            "q_proj.weight_packed in .* as F32; int32 is expected",
        ),
        (
            "dense",
            {f"{Q}.weight_scale": torch.zeros(128, 3)},
            r"weight_scale has shape \[128, 3\] where .* \[128, 4\]",
        ),
        ("outputs", {f"{Q}.weight_zero_point": None}, f"lacks 1 tensor .{Q}.weight_zero_point"),
        (
            "gptq 8 bits",
            {f"{Q}.qzeros": torch.zeros(4, 12).int()},
            r"qzeros has shape \[4, 12\] where .* \[4, 32\]",
        ),
        (
            "gptq order",
            {f"{Q}.g_idx": torch.full((64,), 2).int()},
            f"{Q}.g_idx names groups of inputs that are not 0 to 1; download",
        ),
        ("modelopt", {f"{Q}.weight_scale_2": None}, f"lacks 1 tensor .{Q}.weight_scale_2"),
        (
            "fused nvfp4",
            {"model.layers.0.mlp.experts.gate_up_proj.weight_global_scale": torch.ones(6, 3)},
            r"global_scale has shape \[6, 3\] where config.json makes it \[6, 2\]",
        ),
        (
            "awq",
            {"model.layers.0.mlp.experts.gate_up_proj.qweight": torch.zeros(6, 64, 12).int()},
            "gate_up_proj has all experts of a layer in one tensor, which is not supported with awq; take",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(
    twins: dict[str, Twins], tmp_path: Path, kind: str, changes: dict[str, Tensor | None], sentence: str
) -> None:
    with pytest.raises((CheckpointError, EngineDeadError), match=sentence):
        engine(changed(twins[kind], tmp_path / "damaged", changes), "tp=1")
