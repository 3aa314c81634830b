"""Evaluates the bundled checkpoint on held-out examples and writes the results into its model card.

    python tools/eval_bundled.py [--model FOLDER] [--count N] [--write]

Held-out names, cities, pairs of numbers and tool signatures never occur in training (`bundled_words.held_out`).
Examples are generated from `HELD_OUT_SEED`, so they are reproducible. Answers are generated greedily in fp32 by our
engine; loss and routing are computed with transformers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bundled_data import Example, Maker
from tokenizers import Tokenizer
from train_bundled import BUNDLED, Encoder
from transformers import Qwen3MoeForCausalLM

from qwen3_dist import LLM, SamplingParams

HELD_OUT_SEED = 990_001
BEGIN, END = "<!-- measured: written by tools/eval_bundled.py -->", "<!-- end of measured -->"
ROUTING_EXAMPLES = 300


def final_number(text: str) -> int | None:
    """The number after the last equals sign."""
    match = re.search(r"= (-?\d+)\s*$", text.strip())
    return int(match[1]) if match else None


def calls_in(text: str) -> list[Any] | None:
    """The tool calls of an answer; None if one of them is not JSON."""
    bodies = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
    try:
        return [json.loads(body) for body in bodies]
    except ValueError:
        return None


def as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def without_thoughts(text: str) -> str:
    """The answer without its thoughts."""
    return text.partition("</think>")[2].strip() if "</think>" in text else text.strip()


def measure_answers(model: Path, count: int) -> dict[str, float]:
    """Share of correct answers for each kind of task, over `count` held-out examples each."""
    maker = Maker(HELD_OUT_SEED, measuring=True)
    rows: dict[str, tuple[list[Example], Callable[[str, Example], bool]]] = {}

    def right_sum(text: str, example: Example) -> bool:
        return final_number(without_thoughts(text)) == example.expected

    for thinking in (False, True):
        how = "thinking" if thinking else "directly"
        for digits in (1, 2, 3):
            for op, name in (("+", "addition"), ("-", "subtraction")):
                examples = [maker.sum(digits, thinking, op) for _ in range(count)]
                rows[f"{name}, {digits} digit{'s' * (digits > 1)}, {how}"] = (examples, right_sum)
        for offered, number in (("one tool", (1,)), ("two or three tools", (2, 3))):
            calls = [maker.tool_call(thinking, number) for _ in range(count)]
            rows[f"tool call with the right name and arguments, of {offered}, {how}"] = (
                calls,
                lambda text, example: calls_in(without_thoughts(text)) == [example.expected],
            )
    rows["no call where no tool fits"] = (
        [maker.tool_unfit() for _ in range(count)],
        lambda text, example: "<tool_call>" not in text,
    )
    rows["answer from a tool's result, word for word"] = (
        [maker.tool_answer() for _ in range(count)],
        lambda text, example: without_thoughts(text) == without_thoughts(example.answer),
    )
    rows["JSON object with the fields asked for"] = (
        [maker.json_object() for _ in range(count)],
        lambda text, example: as_json(without_thoughts(text)) == example.expected,
    )
    encoder = Encoder(Tokenizer.from_file(str(model / "tokenizer.json")))
    params = SamplingParams(max_tokens=160, temperature=0)
    shares = {}
    with LLM(str(model), dtype="float32", use_tqdm=False, max_model_len=1024) as llm:
        for name, (examples, right) in rows.items():
            prompts = [encoder.prompt(example) for example in examples]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            good = [right(out.text or "", example) for out, example in zip(outputs, examples, strict=True)]
            shares[name] = sum(good) / len(good)
            print(f"{shares[name]:6.1%}  {name}", flush=True)
    return shares


@torch.no_grad()
def measure_routing(path: Path) -> dict[str, Any]:
    """Held-out loss per learned token, and the share of tokens of each expert, by layer and kind of text."""
    model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    encoder = Encoder(Tokenizer.from_file(str(path / "tokenizer.json")))
    maker = Maker(HELD_OUT_SEED + 1, measuring=True)
    kinds = (maker.sum, maker.tool_call, maker.story, maker.talk, maker.json_object, maker.about_itself)
    counts: dict[str, torch.Tensor] = {}
    losses: dict[str, list[float]] = defaultdict(list)
    tokens: Counter[str] = Counter()
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    for number in range(ROUTING_EXAMPLES):
        example = kinds[number % len(kinds)]()
        ids, labels = encoder.encode(example)
        out = model(input_ids=torch.tensor([ids]), output_router_logits=True)
        wanted = torch.tensor(labels[1:])
        kept = wanted >= 0
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1][kept], wanted[kept], reduction="sum")
        losses[example.kind].append(float(loss))
        tokens[example.kind] += int(kept.sum())
        chosen = torch.stack([logits.topk(top_k, dim=-1).indices.flatten() for logits in out.router_logits])
        hits = torch.stack([layer.bincount(minlength=experts) for layer in chosen]).double()
        counts[example.kind] = counts.get(example.kind, torch.zeros_like(hits)) + hits
    shares = {kind: hits / hits.sum(1, keepdim=True) for kind, hits in counts.items()}
    overall = sum(counts.values())
    assert isinstance(overall, torch.Tensor)
    overall = overall / overall.sum(1, keepdim=True)
    distance = {kind: float((share - overall).abs().sum(1).mean() / 2) for kind, share in shares.items()}
    return {
        "loss": sum(map(sum, losses.values())) / sum(tokens.values()),
        "loss_by_kind": {kind: sum(values) / tokens[kind] for kind, values in losses.items()},
        "expert_shares": [[round(float(share), 3) for share in layer] for layer in overall],
        "least_share_of_fair": float(overall.min() * experts),
        "routing_distance": distance,
    }


def table(shares: dict[str, float], routing: dict[str, Any], count: int) -> str:
    """The results section of the model card."""
    lines = [f"Over {count} held-out examples a row, greedy, fp32 (`make eval-bundled` repeats it):", ""]
    lines += ["| held-out task | right |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in shares.items()]
    lines += ["", f"Held-out loss: {routing['loss']:.3f} nats a learned token (", ""]
    lines[-2] += ", ".join(f"{kind} {loss:.3f}" for kind, loss in routing["loss_by_kind"].items()) + ")."
    lines += ["Share of tokens that each expert gets, by MoE layer (a fair share is 0.125; the least is "]
    lines[-1] += f"{routing['least_share_of_fair']:.2f} of it):"
    lines += ["", "| layer | experts 0 to 7 |", "|---|---|"]
    lines += [f"| {i + 1} | {' '.join(map(str, row))} |" for i, row in enumerate(routing["expert_shares"])]
    lines += [
        "",
        "How far the routing of a kind of text is from that of all (total variation, mean over layers): ",
    ]
    lines[-1] += ", ".join(f"{kind} {value:.2f}" for kind, value in routing["routing_distance"].items()) + "."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="checkpoint to evaluate")
    parser.add_argument("--count", type=int, default=200, help="held-out examples of each kind")
    parser.add_argument("--write", action="store_true", help="write the results into the model card")
    options = parser.parse_args()
    shares, routing = measure_answers(options.model, options.count), measure_routing(options.model)
    print(json.dumps(routing))
    if options.write:
        card = options.model / "README.md"
        text = card.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        measured = table(shares, routing, options.count)
        card.write_text(f"{before}{BEGIN}\n{measured}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
