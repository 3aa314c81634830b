"""Builds the bundled checkpoint, qwen3_dist/bundled/: a small Qwen3-MoE with RANDOM weights.

    python tools/make_bundled.py [--seed N] [--out DIRECTORY]

The tokenizer is trained on the documentation text of the Python that runs this and on generated
sentences; the weights come from the seed. The same Python and library versions give the same bytes.
`chat_template.jinja` and `README.md` in the output folder are written by hand and left alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

BUNDLED = Path(__file__).resolve().parent.parent / "qwen3_dist" / "bundled"
DEFAULT_SEED = 20
VOCAB_SIZE = 4096  # special tokens included; a multiple of 64, so no padding

# Qwen3's added tokens in its order. Special ones are left out of decoded text; the others, such as
# <think>, are single tokens that a reader of the text must see.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VISIBLE = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# Qwen's pre-tokenizer: contractions, words, single digits, punctuation, line ends, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SUBJECTS = (
    "I",
    "you",
    "we",
    "they",
    "the teacher",
    "my friend",
    "a child",
    "the old man",
    "this city",
    "the river",
)
VERBS = ("like", "see", "want", "find", "make", "remember", "ask about", "look for", "talk about", "bring")
OBJECTS = ("the house", "a small dog", "some water", "the answer", "a good book", "the weather", "red apples",
           "three cups of tea", "the way home", "a new song")  # fmt: skip
ENDINGS = ("today", "every morning", "in the garden", "because it is late", "when the sun is up", "after school",
           "with great care", "before dinner", "near the sea", "for the first time")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of weights and sentences")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(options.seed)
    write_tokenizer(tokenizer, options.out)
    write_model(tokenizer, options.seed, options.out)


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of exactly VOCAB_SIZE entries, built like Qwen3's (all 256 bytes are in it)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(VISIBLE),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(seed)), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in VISIBLE])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def corpus(rng: random.Random) -> Iterator[str]:
    """Python's language reference as `help()` holds it, plain sentences, and the JSON that tools speak."""
    yield from (topics[name] for name in sorted(topics))
    for _ in range(20_000):
        subject, verb = rng.choice(SUBJECTS), rng.choice(VERBS)
        yield f"{subject.capitalize()} {verb} {rng.choice(OBJECTS)} {rng.choice(ENDINGS)}.\n"
        yield f"Do {subject} {verb} {rng.choice(OBJECTS)}? Yes, {rng.choice(ENDINGS)}.\n"
    for _ in range(2_000):
        call = {"name": rng.choice(VERBS).replace(" ", "_"), "arguments": {"query": rng.choice(OBJECTS)}}
        schema = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
        yield json.dumps(call)
        yield json.dumps({"type": "function", "function": {"name": call["name"], "parameters": schema}})


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL[1:]),
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 4096,
        "split_special_tokens": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_model(tokenizer: Tokenizer, seed: int, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors (bf16), as transformers writes them."""
    end_of_turn, end_of_text = (tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>"))
    config = Qwen3MoeConfig.from_dict(
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "bos_token_id": end_of_text,
            "pad_token_id": end_of_text,
            "eos_token_id": end_of_turn,
        }
    )
    model = Qwen3MoeForCausalLM(config)
    fill_randomly(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        pad_token_id=end_of_text,
        eos_token_id=[end_of_turn, end_of_text],
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
    )
    model.bfloat16().save_pretrained(out)


@torch.no_grad()
def fill_randomly(model: Qwen3MoeForCausalLM, seed: int) -> None:
    """Weights that make a lively random model: context, heads and experts all change the next token.

    Matrices have gain 1 (std fan_in ** -0.5). The tied embedding is small beside what the layers add,
    or each token would predict itself; attention is sharpened (q_norm, k_norm) and amplified
    (o_proj), or greedy text would soon depend on its last token only and repeat. The final norm
    gives the logits a standard deviation near 2.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding_std, logit_std = 0.01, 2.0
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if name == "model.embed_tokens.weight":
            weight.copy_(noise * embedding_std)
        elif name == "model.norm.weight":
            weight.copy_((1 + 0.1 * noise) * logit_std / (embedding_std * weight.numel() ** 0.5))
        elif weight.dim() == 1:
            weight.copy_((1 + 0.1 * noise) * (2 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1))
        else:
            weight.copy_(noise * weight.shape[-1] ** -0.5 * (3 if name.endswith("o_proj.weight") else 1))


if __name__ == "__main__":
    main()
