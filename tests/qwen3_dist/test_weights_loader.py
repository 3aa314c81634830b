"""Checkpoints in every form they come in, loaded by one rank and by two, against the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_dist import LLM, ModelConfig, SamplingParams
from qwen3_dist.errors import CheckpointError
from qwen3_dist.model.reference import load_reference
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.weights.loader import load_model
from tests.checkpoints import write_checkpoint
from tests.ranks import ROOT

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPT = [3, 1, 150, 42, 7, 7, 9]
Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures("nursery")


def load(path: Path) -> Qwen3Model:
    config = ModelConfig.from_directory(path)
    return load_model(path, config, ParallelContext.single(), torch.float32, torch.device("cpu"))


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return path


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Beside 199 tokens of vocabulary.
AWKWARD = {"num_experts": 9, "moe_intermediate_size": 45, "intermediate_size": 99, "mlp_only_layers": [2]}


def generated(path: Path, layout: str = "tp=1", **settings: str) -> list[int]:
    form = "in_process" if layout == "tp=1" else "processes"
    settings = {"executor": form, "dtype": "float32", **settings}
    with LLM(str(path), layout=layout, use_tqdm=False, num_blocks=8, **settings) as llm:
        return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].token_ids


def fused(tensors: Tensors) -> Tensors:
    """Per-expert tensors stacked as `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(4):
        base = f"model.layers.{layer}.mlp.experts"
        if f"{base}.0.gate_proj.weight" not in tensors:
            continue
        each = [[tensors[f"{base}.{e}.{p}_proj.weight"] for e in range(8)] for p in ("gate", "up", "down")]
        gate, up, down = (torch.stack(stack) for stack in each)
        out[f"{base}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        out[f"{base}.down_proj"] = down
    return out


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,ep=2", "tp=2"])
def test_fused_experts_load_like_experts_of_their_own(tmp_path: Path, layout: str) -> None:
    path = write_checkpoint(tmp_path, moe=True)
    expected = load_reference(path).generate_greedy(PROMPT, 6)
    assert any(".experts.0.gate_proj" in name for name in load_file(path / "model.safetensors"))
    rewrite(path, fused)
    assert any(name.endswith("gate_up_proj") for name in load_file(path / "model.safetensors"))
    assert generated(path, layout) == expected


@pytest.mark.parametrize("moe", [False, True])
def test_several_shards_with_an_index_load_like_one_file(tmp_path: Path, moe: bool) -> None:
    whole = write_checkpoint(tmp_path / "whole", moe=moe)
    shards = tmp_path / "shards"
    write_checkpoint(shards, moe=moe, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    expected, got = load(whole).state_dict(), load(shards).state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_stored_dtype_is_converted_to_the_one_computed_in(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path, moe=True)
    rewrite(path, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    model = load(path)
    assert model.tok_emb.weight.dtype == torch.float32
    stored = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.tok_emb.weight, stored.float())
    assert generated(path) == load_reference(path).generate_greedy(PROMPT, 6)


def reference_keys(path: Path, **changes: Any) -> None:
    """Replaces config.json by one in the reference architecture's own words."""
    hf = json.loads((path / "config.json").read_text())
    config = {
        "vocab_size": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "emb_dim": hf["hidden_size"],
        "n_heads": hf["num_attention_heads"],
        "n_layers": hf["num_hidden_layers"],
        "hidden_dim": hf["intermediate_size"],
        "head_dim": hf["head_dim"],
        "qk_norm": True,
        "n_kv_groups": hf["num_key_value_heads"],
        "rope_base": 1_000_000.0,
        "dtype": "torch.float32",
    }
    if "num_experts_per_tok" in hf:
        config["num_experts"] = hf.get("num_experts", hf.get("num_local_experts"))
        config["num_experts_per_tok"] = hf["num_experts_per_tok"]
        config["moe_hidden_dim"] = hf["moe_intermediate_size"]
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("moe", [False, True])
def test_the_reference_architectures_own_keys_build_the_same_model(tmp_path: Path, moe: bool) -> None:
    path = write_checkpoint(tmp_path, moe=moe)
    before, expected = ModelConfig.from_directory(path), load_reference(path).generate_greedy(PROMPT, 6)
    reference_keys(path)
    after = ModelConfig.from_directory(path)
    assert (after.emb_dim, after.n_kv_groups, after.num_experts) == (64, 2, before.num_experts)
    assert generated(path) == expected


@pytest.mark.parametrize("layout", ["tp=1", "tp=2"])
def test_a_model_without_qk_norm_and_one_with_norm_shifts(tmp_path: Path, layout: str) -> None:
    bare = write_checkpoint(tmp_path / "bare", moe=False)
    reference_keys(bare, qk_norm=False)
    rewrite(
        bare, lambda tensors: {n: t for n, t in tensors.items() if "q_norm" not in n and "k_norm" not in n}
    )
    assert generated(bare, layout) == load_reference(bare).generate_greedy(PROMPT, 6)

    def with_shifts(tensors: Tensors) -> Tensors:
        torch.manual_seed(1)
        norms = [name for name in tensors if "norm.weight" in name or "layernorm.weight" in name]
        shifts = {n.replace(".weight", ".bias"): torch.randn_like(tensors[n]) * 0.1 for n in norms}
        return {**tensors, **shifts}

    shifted = write_checkpoint(tmp_path / "shifted", moe=False)
    plain = load_reference(shifted).generate_greedy(PROMPT, 6)
    reference_keys(shifted, rms_norm_shift=True)
    rewrite(shifted, with_shifts)
    expected = load_reference(shifted).generate_greedy(PROMPT, 6)
    assert expected != plain
    assert generated(shifted, layout) == expected


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=2", "tp=4,ep=2", "tp=4"])
def test_what_does_not_divide_is_padded(tmp_path: Path, layout: str) -> None:
    path = write_checkpoint(tmp_path, moe=True, **AWKWARD)
    assert generated(path, layout) == load_reference(path).generate_greedy(PROMPT, 6)


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "tp=2", "tp=4,ep=2"])
def test_random_weights_are_the_same_in_every_layout(tmp_path: Path, layout: str) -> None:
    path = write_checkpoint(tmp_path, moe=True, **AWKWARD)
    (path / "model.safetensors").unlink()
    assert generated(path, layout, load_format="random") == generated(path, load_format="random")


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    lacking = write_checkpoint(tmp_path / "a", moe=False)
    rewrite(lacking, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor \\({name}\\)"):
        load(lacking)
    extra = write_checkpoint(tmp_path / "b", moe=False)
    rewrite(extra, lambda tensors: {**tensors, "model.layers.9.mlp.up_proj.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"holds 1 tensor \(model.layers.9.mlp.up_proj.weight\)"):
        load(extra)
    wrong = write_checkpoint(tmp_path / "c", moe=False)
    rewrite(wrong, lambda tensors: {**tensors, name: tensors[name][:-1].clone()})
    with pytest.raises(
        CheckpointError, match=rf"{name} has shape \[31, 64\] where config.json makes it \[32, 64\]"
    ):
        load(wrong)


def test_a_tied_heads_own_copy_is_left_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=False, tie_word_embeddings=True)
    expected = generated(path)
    rewrite(path, lambda tensors: {**tensors, "lm_head.weight": torch.zeros(199, 64)})
    assert generated(path) == expected


PEAK = """
import sys, torch
from pathlib import Path
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.parallel.communicator import SingleCommunicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.pipeline import Pipeline
from qwen3_dist.weights.loader import load_model

class Far(SingleCommunicator):
    def __init__(self, size):
        super().__init__()
        self.size = size

path, layout = Path(sys.argv[1]), Layout.parse(sys.argv[2])
groups = (Far(size) for size in (layout.tp, layout.dp, layout.ep, layout.etp))
parallel = ParallelContext(layout, layout.coords(0), *groups, Pipeline())
model = load_model(path, ModelConfig.from_directory(path), parallel, torch.bfloat16, torch.device("cpu"))
shard = sum(p.numel() * p.element_size() for p in model.parameters())
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
print(shard, peak)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 GiB of bf16 in one file: a large embedding and fused and dense weights of real width."""
    path = tmp_path_factory.mktemp("large")
    write_checkpoint(path, moe=True)
    shape = {
        "vocab_size": 100_000,
        "hidden_size": 1024,
        "intermediate_size": 16_384,
        "moe_intermediate_size": 1024,
        "num_attention_heads": 16,
        "head_dim": 64,
        "mlp_only_layers": [0, 1],
    }
    edit_config(path, **shape)
    config = ModelConfig.from_directory(path)
    from qwen3_dist.layout import Layout
    from qwen3_dist.weights.weight_plan import WeightPlan

    pieces = WeightPlan(config, Layout(), set()).pieces(Layout().coords(0))
    tensors = {piece.source: torch.ones(piece.shape, dtype=torch.bfloat16) for piece in pieces}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,ep=2", "tp=2"])
def test_a_rank_needs_little_more_host_memory_than_its_shard(large_checkpoint: Path, layout: str) -> None:
    command = [sys.executable, "-c", PEAK, str(large_checkpoint), layout]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shard, peak = map(int, printed.split())
    print(f"{layout}: shard {shard / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    assert shard > 300 << 20
    assert peak <= 1.3 * shard + (512 << 20)
