"""Trains the bundled checkpoint with transformers' own Qwen3-MoE and its load-balancing loss.

    python tools/train_bundled.py [--steps N] [--work FOLDER]       trains, resuming what FOLDER holds
    python tools/train_bundled.py --export [--work FOLDER]          writes qwen3_dist/bundled/

Batches depend on the seed and the step alone, so a run that was interrupted goes on as if it had not
been. FOLDER gets the tokenizer, `state.pt`, and `loss.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from bundled_data import Example, Maker
from bundled_tokenizer import VOCAB_SIZE, train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_dist.text.chat_template import ChatTemplate

BUNDLED = Path(__file__).resolve().parent.parent / "qwen3_dist" / "bundled"
# Rows and their tokens in a step: short examples are packed into short rows, which cost less attention.
ROWS = {False: (8, 256), True: (4, 512)}  # by whether tools are offered
WARMUP, PEAK, FLOOR = 150, 2.5e-3, 1e-4
SAVE_EVERY = 100


def make_config() -> Qwen3MoeConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "num_hidden_layers": 5,
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
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    }
    return Qwen3MoeConfig(**shape)


class Encoder:
    """Examples to token ids, with which of them are to be learned: the answer and its end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate.from_directory(BUNDLED)

    def prompt(self, example: Example) -> str:
        assert self._template is not None
        return self._template.render(
            example.messages, tools=example.tools, enable_thinking=None if example.thinking else False
        )

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        prompt = self._tokenizer.encode(self.prompt(example), add_special_tokens=False).ids
        answer = self._tokenizer.encode(example.answer + "<|im_end|>", add_special_tokens=False).ids
        return prompt + answer, [-100] * len(prompt) + answer


def batches(encoder: Encoder, seed: int, step: int) -> list[dict[str, torch.Tensor]]:
    """The rows of a step: examples side by side, each with positions of its own from 0."""
    maker = Maker(seed * 1_000_003 + step)
    return [pack(encoder, maker, with_tools, *ROWS[with_tools]) for with_tools in ROWS]


def pack(encoder: Encoder, maker: Maker, with_tools: bool, rows: int, length: int) -> dict[str, torch.Tensor]:
    packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for _ in range(rows):
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while len(ids) < length:
            more, wanted = encoder.encode(maker.example(with_tools))
            ids += more
            labels += [-100, *wanted[1:]]  # the first token of an example is not foretold by another
            positions += range(len(more))
        for name, values in zip(packed, (ids, labels, positions), strict=True):
            packed[name].append(values[:length])
    return {name: torch.tensor(values) for name, values in packed.items()}


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to FLOOR."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def make_model(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(make_config())


def corpus(seed: int) -> Iterator[str]:
    """What the tokenizer learns from: conversations, and Python's language reference for other words."""
    template = ChatTemplate.from_directory(BUNDLED)
    assert template is not None
    maker = Maker(seed)
    for number in range(30_000):
        example = maker.example(with_tools=number % 4 == 0)
        yield template.render(example.messages, tools=example.tools) + example.answer
    yield from (topics[name] for name in sorted(topics))


def train(work: Path, seed: int, steps: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").exists():
        write_tokenizer(train_tokenizer(corpus(seed)), work)
    encoder = Encoder(Tokenizer.from_file(str(work / "tokenizer.json")))
    model = make_model(seed)
    model.set_experts_implementation("grouped_mm")  # four times faster than a loop over experts on a CPU
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    first = 0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="training", unit="step")
    with (work / "loss.jsonl").open("a") as curve:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            row = learn(model, optimizer, batches(encoder, seed, step))
            print(json.dumps({"step": step, **row}), file=curve, flush=True)
            bar.set_postfix(loss=row["loss"], tools=row["loss_tools"])
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save(work, model, optimizer, step + 1)


def learn(model: Any, optimizer: Any, rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """One optimiser step. The loss of a token counts the same wherever it stands."""
    learned = [int((each["labels"] >= 0).sum()) for each in rows]
    optimizer.zero_grad(set_to_none=True)
    losses, balances = [], []
    for each, count in zip(rows, learned, strict=True):
        out = model(**each, use_cache=False)
        (out.loss * count / sum(learned)).backward()
        balances.append(float(out.aux_loss.detach()))
        losses.append(float(out.loss.detach()) - model.router_aux_loss_coef * balances[-1])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    figures = {"loss": losses[0], "loss_tools": losses[1], "balance": sum(balances) / len(balances)}
    return {name: round(value, 4) for name, value in figures.items()}


def save(work: Path, model: Any, optimizer: Any, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").rename(work / "state.pt")


def export(work: Path, seed: int, out: Path) -> None:
    """The trained weights as transformers writes them, in bf16, with the tokenizer beside them."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    end_of_turn, end_of_text = (tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>"))
    model = make_model(seed)
    model.load_state_dict(torch.load(work / "state.pt", weights_only=True)["model"])
    model.config.update(
        {"output_router_logits": False, "bos_token_id": end_of_text, "pad_token_id": end_of_text}
        | {"eos_token_id": end_of_turn}
    )
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
    write_tokenizer(tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=7, help="seed of data and weights")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of the whole run")
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="folder of the run")
    parser.add_argument("--export", action="store_true", help="write the checkpoint instead of training")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder to export to")
    options = parser.parse_args()
    if options.export:
        export(options.work, options.seed, options.out)
    else:
        train(options.work, options.seed, options.steps)


if __name__ == "__main__":
    main()
