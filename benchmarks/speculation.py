"""Speculative decoding by prompt lookup against the same engine without it.

    python -m benchmarks.speculation

Repetitive text is the best case: the bundled model on prompts that repeat themselves, and Qwen3-0.6B's shape with
random weights, whose greedy output is periodic. New text is the worst case: random prompts, sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.record import keep
from qwen3_dist import LLM, SamplingParams

WORDS = [
    "river",
    "amber",
    "lantern",
    "copper",
    "meadow",
    "thunder",
    "velvet",
    "harbor",
    "cinder",
    "maple",
    "falcon",
    "marble",
]


def repeating(count: int, llm: LLM) -> list[Any]:
    """Repetitive prompts: text for the bundled model, token sequences for random weights."""
    if not llm.config.model:
        lines = (" ".join(WORDS[number % 6 :]) for number in range(count))
        return [f"repeat: {line} => {line}\n" * 3 for line in lines]
    return [list(range(100 * number, 100 * number + 16)) * 8 for number in range(1, count + 1)]


def new(count: int, llm: LLM) -> list[Any]:
    """Random prompts."""
    rng, vocab_size = random.Random(0), llm.model_config.vocab_size
    return [[rng.randrange(vocab_size) for _ in range(128)] for _ in range(count)]


def measure(llm: LLM, prompts: list[Any], params: SamplingParams) -> dict[str, float]:
    """Output rate, and the engine's counters for this run."""
    before, started = llm._engine.stats(), time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, after = time.perf_counter() - started, llm._engine.stats()
    return {
        "tokens_per_s": sum(len(output.token_ids) for output in outputs) / seconds,
        "turns": after.scheduled_sequences - before.scheduled_sequences,
        "drafted": after.drafted_tokens - before.drafted_tokens,
        "accepted": after.accepted_tokens - before.accepted_tokens,
    }


def compared(
    model: dict[str, Any], speculative: str, batches: list[int], length: int, rounds: int
) -> list[Any]:
    """A row for each workload and batch size: medians over `rounds` runs of both engines, which alternate.

    `tokens_per_turn` is the mean number of tokens that a sequence gets from a step.
    """
    rows = []
    common = {**model, "use_tqdm": False, "prefix_caching": False, "num_blocks": 1024}
    with LLM(**common) as off, LLM(**common, speculative=speculative) as on:
        for workload, make, temperature in (("repeating", repeating, 0.0), ("new", new, 1.0)):
            for batch in batches:
                prompts = make(batch, off)
                params = SamplingParams(temperature=temperature, seed=1, max_tokens=length, ignore_eos=True)
                for llm in (off, on):
                    measure(llm, prompts, SamplingParams(temperature=0, max_tokens=4))
                turns = [(measure(off, prompts, params), measure(on, prompts, params)) for _ in range(rounds)]
                off_rate, on_rate = (
                    statistics.median(turn[side]["tokens_per_s"] for turn in turns) for side in (0, 1)
                )
                counts = turns[-1][1]
                rows.append(
                    {
                        "workload": workload,
                        "batch": batch,
                        "off_tokens_per_s": round(off_rate, 1),
                        "on_tokens_per_s": round(on_rate, 1),
                        "ratio": round(on_rate / off_rate, 2),
                        "tokens_per_turn": round(batch * length / counts["turns"], 2),
                        "drafted": counts["drafted"],
                        "accepted": counts["accepted"],
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speculative", default="ngram", help="default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--output-len", type=int, default=96, help="tokens generated for each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each engine")
    parser.add_argument(
        "--layers", type=int, default=28, help="layers of the random model; Qwen3-0.6B has 28"
    )
    args = parser.parse_args()
    how = (args.speculative, args.batches, args.output_len, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        shape = {**SHAPES["dense"], "num_hidden_layers": args.layers}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        models = {
            "bundled": {"model": ""},
            "Qwen3-0.6B's shape": {"model": folder, "load_format": "random"},
        }
        rows = [{"model": name, **row} for name, model in models.items() for row in compared(model, *how)]
    keep("speculation", rows)


if __name__ == "__main__":
    main()
