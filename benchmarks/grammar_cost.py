"""Cost of structured outputs: computing masks and advancing grammars per token, and throughput of a whole engine.

    python -m benchmarks.grammar_cost [--tokenizer DIRECTORY]

The default tokenizer is the bundled model's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import keep
from qwen3_dist import LLM, SamplingParams
from qwen3_dist.percentiles import percentile
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.tool_grammar import tool_call_grammar
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.worker.sampling.grammar_matcher import Grammars

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "save", "parameters": PERSON}}
FORMS = {
    "json schema": StructuredOutputs(json=PERSON),
    "any json object": StructuredOutputs(json_object=True),
    "regex": StructuredOutputs(regex=r"(?:[a-z]+ ){20,200}"),
    "tool call": tool_call_grammar([TOOL]),
}
ROWS = (1, 16)
STEPS = 60


def steps_of(form: StructuredOutputs, directory: Path, rows: int) -> list[float]:
    """Seconds that each of STEPS steps spends on masks and grammar states of `rows` sequences."""
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    vocab_size = -(-tokenizer.vocab_size // 128) * 128
    grammars = Grammars(directory, vocab_size, tokenizer.eos_token_ids)
    grammar = compile_grammar(form)
    choose = random.Random(0)
    masks = torch.empty(rows, vocab_size // 32, dtype=torch.int32)
    matchers = [grammars.matcher(grammar) for _ in range(rows)]
    taken = []
    for _ in range(STEPS):
        started = time.perf_counter()
        for matcher, mask in zip(matchers, masks, strict=True):
            matcher.fill_mask(mask)
        masked = time.perf_counter() - started
        bits = (masks[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
        tokens = [choose.choice(row.flatten().nonzero()[:, 0].tolist()) for row in bits]
        started = time.perf_counter()
        for index, token in enumerate(tokens):
            if token in tokenizer.eos_token_ids:
                matchers[index] = grammars.matcher(grammar)
            else:
                matchers[index].accept(token)
        taken.append(masked + time.perf_counter() - started)
    return taken[5:]


def engine_rows() -> list[dict[str, Any]]:
    """Tokens per second of the bundled model with each form and without, measured alternately."""
    rows = []
    prompts = [f"Number {i}:" for i in range(max(ROWS))]
    with LLM(num_blocks=512, prefix_caching=False, use_tqdm=False) as llm:
        for count in ROWS:
            rates: dict[str, list[float]] = {name: [] for name in ("free", *FORMS)}
            for turn in range(6):
                for name in rates:
                    form = FORMS.get(name)
                    params = SamplingParams(
                        max_tokens=64, seed=turn, ignore_eos=form is None, structured_outputs=form
                    )
                    started = time.perf_counter()
                    outputs = llm.generate(prompts[:count], params)
                    seconds = time.perf_counter() - started
                    if turn:
                        rates[name].append(sum(len(output.token_ids) for output in outputs) / seconds)
            free = statistics.median(rates["free"])
            for name in FORMS:
                rate = statistics.median(rates[name])
                rows.append(
                    {
                        "form": name,
                        "rows": count,
                        "tokens_per_s": round(rate),
                        "of_free": round(rate / free, 2),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=resolve_model(""))
    directory = parser.parse_args().tokenizer
    rows: list[dict[str, Any]] = []
    for name, form in FORMS.items():
        for count in ROWS:
            taken = sorted(seconds / count * 1e6 for seconds in steps_of(form, directory, count))
            rows.append(
                {
                    "form": name,
                    "rows": count,
                    "us_per_token_p50": round(percentile(taken, 50), 1),
                    "us_per_token_p90": round(percentile(taken, 90), 1),
                }
            )
    keep("grammar-cost", [*rows, *engine_rows()])


if __name__ == "__main__":
    main()
