"""Checkpoints with packed codes: each layout gives what the reference gives with the weights that the codes stand
for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.quantized import Twins
from tests.quantized_packed import write_awq, write_fp4, write_gptq, write_pack_quantized
from tests.qwen3_dist.test_quantized import DENSE, GREEDY, ODD, PROMPTS, assert_equal, engine

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
        ("8 bits", "tp=1"),
        ("8 bits", "tp=2"),
    ],
)
def test_every_layout_computes_with_the_weights_that_the_codes_stand_for(
    twins: dict[str, Twins], kind: str, layout: str
) -> None:
    with engine(twins[kind].quantized, layout) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), twins[kind].plain)
