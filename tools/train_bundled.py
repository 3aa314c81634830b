"""Trains the bundled checkpoint with transformers' Qwen3-MoE and its load-balancing loss.

    python tools/train_bundled.py [--work FOLDER]            trains, or resumes from FOLDER
    python tools/train_bundled.py --export [--work FOLDER]   writes qwen3_dist/bundled/ and the loss curve

Batches depend only on the seed and the step, so that a resumed run gives the same result. FOLDER gets the tokenizer,
`state.pt` and `loss.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from bundled_data import Example, Maker
from bundled_drills import drill
from bundled_tokenizer import VOCAB_SIZE, train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen3_dist.model.reference import load_reference
from qwen3_dist.text.chat_template import ChatTemplate

ROOT = Path(__file__).resolve().parent.parent
BUNDLED, DOCS = ROOT / "qwen3_dist" / "bundled", ROOT / "docs"
WARMUP, FLOOR = 200, 5e-5


@dataclass(frozen=True)
class Stage:
    """A stage of training. `rows` has (rows per step, tokens per row) for each source; short examples are packed into
    short rows, which cost less attention. `invented` is the share of invented names, which take several tokens."""

    steps: int
    peak: float  # highest learning rate
    rows: dict[str, tuple[int, int]]
    invented: float
    wild: bool  # names with arbitrary spelling, and tools with arbitrary names
    balance: float  # weight of the load-balancing loss
    balance_each_layer: bool  # per layer, not over all layers together as in transformers


# After the first stage the model failed to copy names of several tokens, since most names are one token, and some
# experts were unused. After the second it still failed at tokens that no training name contains ("Pra" of Prague), and
# sometimes called a tool by a more common name. Hence the second and third stage.
STAGES = (
    Stage(6000, 2e-3, {"drill": (6, 128), "chat": (3, 256), "tools": (2, 448)}, 0.0, False, 0.01, False),
    Stage(1500, 8e-4, {"drill": (2, 128), "chat": (2, 256), "tools": (3, 448)}, 0.4, False, 0.05, True),
    Stage(1800, 8e-4, {"drill": (2, 128), "chat": (2, 256), "tools": (3, 448)}, 0.5, True, 0.05, True),
)
STEPS = sum(stage.steps for stage in STAGES)
SAVE_EVERY = 100
CURVE_EVERY = 25


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
    """Encodes examples as token ids and labels. Only the answer and its end are learned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate.from_directory(BUNDLED)

    def prompt(self, example: Example) -> str:
        assert self._template is not None
        return self._template.render(
            example.messages, tools=example.tools, enable_thinking=None if example.thinking else False
        )

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        return self._encode(self.prompt(example), example.answer)

    def encode_drill(self, given: str, answer: str) -> tuple[list[int], list[int]]:
        return self._encode("<|im_start|>" + given, answer)

    def _encode(self, given: str, answer: str) -> tuple[list[int], list[int]]:
        prompt = self._tokenizer.encode(given, add_special_tokens=False).ids
        learned = self._tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False).ids
        return prompt + learned, [-100] * len(prompt) + learned


def batches(encoder: Encoder, seed: int, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The batch of a step: rows of packed examples, each with positions from 0."""
    stage, _ = stage_of(step)
    maker = Maker(seed * 1_000_003 + step, invented=stage.invented, wild=stage.wild)
    sources: dict[str, Callable[[], tuple[list[int], list[int]]]] = {
        "drill": lambda: encoder.encode_drill(*drill(maker)),
        "chat": lambda: encoder.encode(maker.example(with_tools=False)),
        "tools": lambda: encoder.encode(maker.example(with_tools=True)),
    }
    return {name: pack(source, *stage.rows[name]) for name, source in sources.items()}


def pack(
    source: Callable[[], tuple[list[int], list[int]]], rows: int, length: int
) -> dict[str, torch.Tensor]:
    packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for _ in range(rows):
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while len(ids) < length:
            more, wanted = source()
            ids += more
            labels += wanted
            positions += range(len(more))
        for name, values in zip(packed, (ids, labels, positions), strict=True):
            packed[name].append(values[:length])
    return {name: torch.tensor(values) for name, values in packed.items()}


def stage_of(step: int) -> tuple[Stage, int]:
    """The stage of a step, and the index of the step in the stage."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise ValueError("training is over")


def learning_rate(step: int) -> float:
    """Linear warm-up in each stage, then cosine decay to FLOOR."""
    stage, at = stage_of(step)
    if at < WARMUP:
        return stage.peak * (at + 1) / WARMUP
    progress = (at - WARMUP) / max(1, stage.steps - WARMUP)
    return FLOOR + (stage.peak - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def make_model(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(make_config())


def corpus(seed: int) -> Iterator[str]:
    """Training texts of the tokenizer: conversations, and Python's language reference for other words."""
    template = ChatTemplate.from_directory(BUNDLED)
    assert template is not None
    maker = Maker(seed)
    for number in range(30_000):
        example = maker.example(with_tools=number % 4 == 0)
        yield template.render(example.messages, tools=example.tools) + example.answer
    yield from (topics[name] for name in sorted(topics))


def train(work: Path, seed: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").exists():
        write_tokenizer(train_tokenizer(corpus(seed)), work)
    encoder = Encoder(Tokenizer.from_file(str(work / "tokenizer.json")))
    model = make_model(seed)
    model.set_experts_implementation("grouped_mm")  # four times faster than a loop over experts on a CPU
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=STAGES[0].peak, betas=(0.9, 0.95), fused=True)
    first = 0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(range(first, STEPS), initial=first, total=STEPS, desc="training", unit="step")
    with (work / "loss.jsonl").open("a") as curve:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            row = learn(model, optimizer, batches(encoder, seed, step), stage_of(step)[0])
            print(json.dumps({"step": step, **row}), file=curve, flush=True)
            bar.set_postfix(row)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
                save(work, model, optimizer, step + 1)


def learn(
    model: Any, optimizer: Any, parts: dict[str, dict[str, torch.Tensor]], stage: Stage
) -> dict[str, float]:
    """One optimiser step. All learned tokens have the same weight; logits of other tokens are not computed."""
    kept = {name: part["labels"][:, 1:] >= 0 for name, part in parts.items()}
    learned = sum(int(mask.sum()) for mask in kept.values())
    optimizer.zero_grad(set_to_none=True)
    figures = {}
    balances = []
    for name, part in parts.items():
        out = model.model(
            part["input_ids"], position_ids=part["position_ids"], output_router_logits=True, use_cache=False
        )
        logits = model.lm_head(out.last_hidden_state[:, :-1][kept[name]])
        loss = cross_entropy(logits, part["labels"][:, 1:][kept[name]], reduction="sum")
        routers = out.router_logits
        groups = [(layer,) for layer in routers] if stage.balance_each_layer else [routers]
        each = [load_balancing_loss_func(g, model.num_experts, model.num_experts_per_tok) for g in groups]
        balance = sum(each) / len(each)
        (loss / learned + stage.balance * balance / len(parts)).backward()
        figures[name] = float(loss.detach()) / int(kept[name].sum())
        balances.append(float(balance.detach()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    figures["balance"] = sum(balances) / len(balances)
    return {name: round(value, 4) for name, value in figures.items()}


def save(work: Path, model: Any, optimizer: Any, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").rename(work / "state.pt")


def export(work: Path, seed: int, out: Path) -> None:
    """Writes the trained checkpoint in bf16 in transformers' format, with the tokenizer."""
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
    check_logits(out)


@torch.no_grad()
def check_logits(out: Path) -> None:
    """Asserts that our model gives the same logits as transformers for the exported checkpoint."""
    encoder, maker = Encoder(Tokenizer.from_file(str(out / "tokenizer.json"))), Maker(1)
    theirs = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = load_reference(out)
    for with_tools in (False, True):
        ids = torch.tensor(encoder.encode(maker.example(with_tools))[0])
        torch.testing.assert_close(ours(ids), theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def draw_curve(work: Path) -> None:
    """Writes the loss curve as CSV and PNG: means over CURVE_EVERY steps."""
    import matplotlib.pyplot as plt

    by_step = {row["step"]: row for row in map(json.loads, (work / "loss.jsonl").read_text().splitlines())}
    rows = list(by_step.values())  # an interrupted run repeats steps; the last one counts
    names = [name for name in rows[0] if name != "step"]
    points = [rows[at : at + CURVE_EVERY] for at in range(0, len(rows), CURVE_EVERY)]
    steps = [part[-1]["step"] + 1 for part in points]
    means = {name: [sum(row[name] for row in part) / len(part) for part in points] for name in names}
    lines = [",".join(["step", *names])]
    lines += [
        ",".join([str(step), *(f"{means[name][i]:.4f}" for name in names)]) for i, step in enumerate(steps)
    ]
    (DOCS / "bundled-loss.csv").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, label in (
        ("drill", "drills"),
        ("chat", "conversations"),
        ("tools", "conversations with tools"),
    ):
        axes.plot(steps, means[name], label=label)
    axes.set(
        xlabel="step", ylabel="loss, nats a learned token", yscale="log", title="The bundled model's training"
    )
    axes.legend()
    figure.savefig(DOCS / "bundled-loss.png", dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=7, help="seed of data and weights")
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="directory of the run")
    parser.add_argument("--export", action="store_true", help="write the checkpoint instead of training")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="directory to export to")
    options = parser.parse_args()
    if options.export:
        export(options.work, options.seed, options.out)
        draw_curve(options.work)
    else:
        train(options.work, options.seed)


if __name__ == "__main__":
    main()
