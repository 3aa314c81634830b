"""The reference model against transformers, and every layout against the reference."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import valid_layouts
from qwen3_dist.model.reference import load_reference
from tests.checkpoints import DENSE, MOE, write_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"moe": False},
    "dense tied": {"moe": False, "tie_word_embeddings": True},
    "dense bias": {"moe": False, "attention_bias": True},
    "dense head_dim": {"moe": False, "head_dim": 24},
    "moe": {"moe": True},
    "moe unnormalised": {"moe": True, "norm_topk_prob": False},
    "moe with a dense layer": {"moe": True, "mlp_only_layers": [1]},
    "moe every second layer": {"moe": True, "decoder_sparse_step": 2},
}
PROMPTS = [list(range(3, 40)), [7, 1, 150, 198, 0], [42], list(range(100, 120))]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3)
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_reference_logits_equal_those_of_transformers(
    tmp_path: Path, shape: str, dtype: torch.dtype, tolerance: float
) -> None:
    path = write_checkpoint(tmp_path, **SHAPES[shape])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    ids = torch.tensor(PROMPTS[0])
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0].float()
    got = load_reference(path, dtype)(ids).float()
    assert (got - expected).abs().max() <= tolerance


# Nothing divides evenly: 10 experts of 45 columns, 99 dense columns, 199 tokens, 5 layers, one of them dense.
ODD: dict[str, Any] = {
    "intermediate_size": 99,
    "moe_intermediate_size": 45,
    "num_experts": 10,
    "num_hidden_layers": 5,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dense": {"moe": False, "intermediate_size": 99, "tie_word_embeddings": True},
    "moe": {"moe": True, "mlp_only_layers": [1], **ODD},
    "moe of 3 KV groups": {
        "moe": True,
        "mlp_only_layers": [1],
        **ODD,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **shape)
        for kind, shape in CHECKPOINTS.items()
    }


@functools.cache
def answers_of_reference(checkpoint: Path) -> list[tuple[list[int], Tensor]]:
    """Each prompt's 12 greedy tokens and their log-probabilities [12]."""
    reference = load_reference(checkpoint)
    answers = []
    for prompt in PROMPTS:
        token_ids = reference.generate_greedy(prompt, 12)
        logits = reference(torch.tensor(prompt + token_ids))[len(prompt) - 1 : -1]
        answers.append((token_ids, logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]))
    return answers


def layouts(kind: str, *worlds: int) -> list[str]:
    """Every layout of so many ranks that the rules allow for a checkpoint of this kind."""
    shape = {**DENSE, **(MOE if CHECKPOINTS[kind]["moe"] else {}), **CHECKPOINTS[kind]}
    config = ModelConfig.from_dict({**shape, "model_type": "qwen3_moe" if shape["moe"] else "qwen3"})
    return [str(layout) for world in worlds for layout in valid_layouts(config, world)]


CASES = [("dense", layout, "auto") for layout in layouts("dense", 1, 2, 4)]
CASES += [("moe", "tp=1", "auto")]
CASES += [
    ("moe", layout, dispatch) for layout in layouts("moe", 2, 4) for dispatch in ("all_gather", "all_to_all")
]
CASES += [("moe of 3 KV groups", layout, "all_to_all") for layout in layouts("moe of 3 KV groups", 2)]
CASES += [("moe of 3 KV groups", "dp=3,ep=3", "all_to_all"), ("moe of 3 KV groups", "tp=3", "all_gather")]


def test_the_cases_hold_every_mix_of_axes() -> None:
    assert {(kind, layout) for kind, layout, _ in CASES} >= {
        ("dense", "tp=2,dp=2"),
        ("dense", "dp=2,pp=2"),
        ("dense", "pp=4"),
        ("moe", "dp=4,ep=4"),
        ("moe", "dp=4"),
        ("moe", "tp=2,dp=2,ep=4"),
        ("moe", "tp=4,ep=2"),
        ("moe", "tp=2,pp=2,ep=2"),
    }


@pytest.mark.parametrize(("kind", "layout", "dispatch"), CASES)
def test_every_layout_generates_the_reference_tokens(
    checkpoints: dict[str, Path], kind: str, layout: str, dispatch: str
) -> None:
    # 16 tokens a step: prompts are prefilled in chunks beside decodes, fewer tokens than ranks at the end.
    with LLM(
        str(checkpoints[kind]),
        layout=layout,
        moe_dispatch=dispatch,
        executor="in_process" if layout == "tp=1" else "processes",
        max_num_batched_tokens=16,
        use_tqdm=False,
    ) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        alone = llm.generate(PROMPTS[1:2], GREEDY, use_tqdm=False)  # other dp groups are idle
        llm._engine.check_integrity()
        stats = llm._engine.stats()
    assert stats.free_blocks == stats.total_blocks
    assert alone[0].token_ids == outputs[1].token_ids
    for output, (token_ids, logprobs) in zip(outputs, answers_of_reference(checkpoints[kind]), strict=True):
        assert output.token_ids == token_ids
        got = torch.tensor([entry.logprob for entry in output.logprobs or []])
        assert torch.allclose(got, logprobs, atol=1e-4)
