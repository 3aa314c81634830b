"""The memory report against transformers' own models and the official names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from cluster.planning.memory import (
    active_parameters,
    inspect_model,
    kv_bytes_per_token,
    rank_bytes,
    rank_parameters,
    total_parameters,
)
from cluster.planning.official import find_config
from qwen3_dist import Layout, ModelConfig
from tests.checkpoints import DENSE, MOE, write_checkpoint

ROOT = Path(__file__).parent.parent.parent
OFFICIAL = ROOT.parent / "shared/data/configs/qwen3.json"


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {**MOE},
        {**MOE, "mlp_only_layers": [0, 2]},
        {**MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ],
)
def test_parameters_are_those_of_transformers(shape: dict[str, Any]) -> None:
    moe = "num_experts" in shape
    with torch.device("meta"):
        if moe:
            model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**DENSE, **shape}))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**{**DENSE, **shape}))
    config = ModelConfig.from_dict(model.config.to_dict())
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official shapes lie in ../shared")
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Qwen3-0.6B", 0.596e9, 0.596e9),
        ("Qwen3-8B", 8.19e9, 8.19e9),
        ("Qwen3-30B-A3B", 30.5e9, 3.3e9),
        ("Qwen3-235B-A22B", 235.1e9, 22.2e9),
        ("Qwen3-Coder-480B-A35B-Instruct", 480e9, 35e9),
    ],
)
def test_official_sizes_are_what_their_names_say(name: str, total: float, active: float) -> None:
    config = ModelConfig.from_dict(json.loads(OFFICIAL.read_text())[name])
    assert total_parameters(config) == pytest.approx(total, rel=0.01)
    assert active_parameters(config) == pytest.approx(active, rel=0.02)


@pytest.fixture
def moe(tmp_path: Path) -> ModelConfig:
    return ModelConfig.from_directory(write_checkpoint(tmp_path, moe=True, mlp_only_layers=[1]))


def replicated(config: ModelConfig) -> int:
    """Norms and gates: what every tp and ep rank holds in full."""
    norms = config.n_layers * (2 * config.emb_dim + 2 * config.head_dim) + config.emb_dim
    gates = sum(config.is_moe_layer(layer) for layer in range(config.n_layers))
    return norms + gates * config.num_experts * config.emb_dim


@pytest.mark.parametrize("layout", ["tp=2", "tp=2,ep=2", "dp=2,ep=2"])
def test_ranks_share_what_is_split_and_repeat_what_is_not(moe: ModelConfig, layout: str) -> None:
    parsed = Layout.parse(layout)
    ranks = [rank_parameters(moe, parsed, rank) for rank in range(parsed.world)]
    experts = 3 * 8 * 3 * moe.emb_dim * moe.moe_hidden_dim
    whole = total_parameters(moe)
    repeated = replicated(moe) if parsed.dp == 1 else whole - experts
    assert sum(ranks) == whole + repeated


def test_kv_groups_beyond_tp_are_counted_on_every_rank_that_holds_them(moe: ModelConfig) -> None:
    one = kv_bytes_per_token(moe, Layout(), 0, 2)
    assert one == 2 * 4 * 2 * 16 * 2  # K and V, layers, groups, head_dim, bytes
    assert kv_bytes_per_token(moe, Layout(tp=2), 0, 2) == one // 2
    assert kv_bytes_per_token(moe, Layout(tp=8), 0, 2) == one // 2


def test_a_pipeline_stage_holds_its_layers_alone(moe: ModelConfig) -> None:
    first, last = (rank_parameters(moe, Layout(pp=2), rank) for rank in range(2))
    assert first + last == total_parameters(moe)
    assert kv_bytes_per_token(moe, Layout(pp=2), 0, 2) == kv_bytes_per_token(moe, Layout(), 0, 2) // 2


def test_codes_take_a_byte_and_scales_four() -> None:
    """Qwen3-30B-A3B in FP8, counted by hand; at tp=8 a rank has the scales of blocks that it shares too."""
    (_, plain), (name, config) = (find_config(name) for name in ("Qwen3-30B-A3B", "qwen/qwen3-30b-a3b-fp8"))
    assert name == "Qwen3-30B-A3B-FP8"
    attention = 48 * (4096 + 512 + 512 + 4096) * 2048
    experts = 48 * 128 * 3 * 768 * 2048
    whole = total_parameters(config)
    assert whole == total_parameters(plain) and active_parameters(config) == active_parameters(plain)
    codes = attention + experts
    assert rank_bytes(config, Layout(), 0) == codes + 4 * codes // 128**2 + 2 * (whole - codes)
    # 96 columns of an expert lie in one block or in two: 2, 4, 6 and 8 parts end in a new block
    parsed = Layout.parse("tp=8")
    parts = [rank_bytes(config, parsed, rank) - rank_bytes(config, parsed, 0) for rank in range(8)]
    more = 48 * 128 * 3 * 16 * 4
    assert parts == [0, more, more, 0, 0, more, more, 0]


def test_weights_that_are_rounded_while_loading_take_as_many_bytes_as_a_checkpoint_of_codes() -> None:
    (_, plain), (_, stored) = (find_config(f"Qwen3-30B-A3B{end}") for end in ("", "-FP8"))
    for layout in (Layout(), Layout.parse("tp=8"), Layout.parse("tp=2,dp=2,ep=4")):
        assert rank_bytes(plain.rounded("fp8"), layout, 1 % layout.world) == rank_bytes(
            stored, layout, 1 % layout.world
        )


def test_the_report_names_the_layouts_of_a_world(tmp_path: Path) -> None:
    report = inspect_model(
        "m", ModelConfig.from_directory(write_checkpoint(tmp_path, moe=True)), Layout(tp=2, ep=2), 2
    )
    assert report["valid_layouts"] == ["tp=2", "tp=2,ep=2", "dp=2", "dp=2,ep=2", "pp=2"]
    assert len(report["bytes_per_rank"]) == 2
    assert report["dtype"] == "float32"


def test_inspect_prints_the_report_as_one_json_object() -> None:
    command = [
        sys.executable,
        "-m",
        "serve_app",
        "inspect",
        "--layout",
        "tp=2,ep=2",
        "--world",
        "4",
        "--json",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    report = json.loads(printed)
    assert report["model"] == "bundled" and report["layout"] == "tp=2,ep=2"
    assert "tp=4,ep=2" in report["valid_layouts"]
