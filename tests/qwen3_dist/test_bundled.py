"""The bundled checkpoint is real HuggingFace format, small, lively, and says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_dist.config import ModelConfig
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer, read_generation_defaults

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "qwen3_dist" / "bundled"
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"


def bundled_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_directory(BUNDLED)
    assert tokenizer is not None
    return tokenizer


def test_its_config_reads_as_a_small_moe() -> None:
    config = ModelConfig.from_directory(BUNDLED)
    assert (config.emb_dim, config.n_layers, config.n_heads, config.n_kv_groups, config.head_dim) == (
        192,
        6,
        8,
        2,
        32,
    )
    assert (config.hidden_dim, config.moe_hidden_dim, config.num_experts, config.num_experts_per_tok) == (
        512,
        128,
        8,
        2,
    )
    assert (config.context_length, config.rope_base, config.dtype) == (4096, 1e6, "bfloat16")
    assert (config.tie_word_embeddings, config.norm_topk_prob, config.qk_norm) == (True, True, True)
    assert [config.is_moe_layer(layer) for layer in range(6)] == [False, True, True, True, True, True]


def test_the_whole_folder_stays_under_sixteen_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 16e6


def test_its_card_says_that_the_weights_are_random() -> None:
    sys.path.insert(0, str(REPO / "tools"))
    try:
        seed = pytest.importorskip("make_bundled").DEFAULT_SEED
    finally:
        sys.path.pop(0)
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert f"random, drawn from seed {seed}, and untrained" in card


def test_its_tokenizer_fills_the_models_vocabulary_and_knows_what_ends_a_turn() -> None:
    tokenizer = bundled_tokenizer()
    assert tokenizer.vocab_size == ModelConfig.from_directory(BUNDLED).vocab_size
    assert tokenizer.eos_token_ids == (tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>"))
    assert read_generation_defaults(BUNDLED) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.skipif(not REAL.exists(), reason="the real Qwen3 tokenizer is not at hand")
def test_its_tokenizer_is_built_like_the_real_one() -> None:
    ours, real = (json.loads((d / "tokenizer.json").read_text(encoding="utf-8")) for d in (BUNDLED, REAL))
    assert [{**token, "id": None} for token in ours["added_tokens"]] == [
        {**token, "id": None} for token in real["added_tokens"]
    ]
    assert (ours["normalizer"], ours["pre_tokenizer"]) == (real["normalizer"], real["pre_tokenizer"])


def test_transformers_loads_it_and_greedy_text_is_no_loop() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    template = ChatTemplate.from_directory(BUNDLED)
    assert template is not None
    ids = bundled_tokenizer().encode(template.render([{"role": "user", "content": "Hello"}]))
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=48,
        min_new_tokens=48,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits)
    assert torch.isfinite(logits).all()
    assert 1.0 < logits.std() < 4.0
    assert len(set(out.sequences[0, len(ids) :].tolist())) > 24


def test_the_tool_rebuilds_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    built_with = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))["transformers_version"]
    if pytest.importorskip("transformers").__version__ != built_with:
        pytest.skip("built with another transformers")
    subprocess.run([sys.executable, REPO / "tools" / "make_bundled.py", "--out", tmp_path], check=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (BUNDLED / name).read_text(encoding="utf-8")
    rebuilt, shipped = (safetensors.load_file(d / "model.safetensors") for d in (tmp_path, BUNDLED))
    # Another CPU's vector units may round a random number otherwise: one bf16 step is allowed.
    torch.testing.assert_close(rebuilt, shipped, rtol=2**-7, atol=1e-6)
    tokenizer = Tokenizer.from_directory(
        tmp_path
    )  # learned from this Python's text, so only its size is fixed
    assert tokenizer is not None
    assert tokenizer.vocab_size == bundled_tokenizer().vocab_size
