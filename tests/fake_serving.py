"""A rank that serves random steps on a card that computes nothing: what Triton compiles before it is ready, and after.

To be run by itself, like `tests.fake_gpu`: `python -m tests.fake_serving MODEL [--layout tp=2,ep=2] [--steps 1000]`
prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qwen3_dist.layout import Layout
from qwen3_dist.ops.cuda import compiles
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, PromptLogprobsSpec, SampleSpec, SequenceStep, StepPlan
from tests.fake_gpu import connected, fake_gpu
from tests.fake_rank import built_model, without_numbers
from tests.setups import setup

BLOCK_SIZE = 16
BLOCKS = 4096
MAX_SEQS, MAX_TOKENS, MAX_LEN = 48, 1024, 2048


class Traffic:
    """Random steps of sequences that come, are computed in chunks, decode, guess and end."""

    def __init__(self, seed: int, dp: int, guesses: int, vocab_size: int) -> None:
        self._random = random.Random(seed)
        self._dp, self._guesses, self._vocab = dp, guesses, vocab_size

    def plan(self, step: int) -> StepPlan:
        """The first dp group's; groups have other numbers of tokens, and some none, but not all."""
        groups: list[tuple[SequenceStep, ...]] = []
        while not any(groups):
            groups = [self._group() for _ in range(self._dp)]
        return StepPlan.for_groups(step, groups)[0]

    def _group(self) -> tuple[SequenceStep, ...]:
        draw = self._random
        idle = ["idle"] if self._dp > 1 else []
        kind = draw.choice(["decodes", "decodes", "prompts", "mixed", "mixed", *idle])
        counts = {
            "decodes": 0 if kind in ("prompts", "idle") else self._size(MAX_SEQS - 1),
            "guesses": draw.randint(0, 4) if self._guesses and kind == "mixed" else 0,
            "prompts": draw.choice([1, 1, 2, 5]) if kind in ("prompts", "mixed") else 0,
        }
        parts: list[SequenceStep] = []
        left = MAX_TOKENS
        for name in [name for name, count in counts.items() for _ in range(count)][:MAX_SEQS]:
            if name == "prompts":
                part = self._prompt(len(parts), min(left, 1 + self._size(MAX_TOKENS - 1)))
            else:
                part = self._decode(len(parts)) if name == "decodes" else self._guess(len(parts))
            if len(part.token_ids) <= left:
                parts.append(part)
                left -= len(part.token_ids)
            if not left:
                break
        return tuple(sorted(parts, key=lambda part: len(part.token_ids) > 1))

    def _size(self, most: int) -> int:
        """From 1 to `most`, small ones and large ones alike."""
        return min(most, int(2 ** self._random.uniform(0, most.bit_length())))

    def _decode(self, slot: int) -> SequenceStep:
        return self._step(slot, (LAST_SAMPLED,), self._random.randrange(MAX_LEN), self._spec())

    def _guess(self, slot: int) -> SequenceStep:
        tokens = (5,) * (1 + self._guesses)
        start = self._random.randrange(MAX_LEN - self._guesses)
        return self._step(slot, tokens, start, self._spec())._replace(num_drafted=self._guesses)

    def _prompt(self, slot: int, size: int) -> SequenceStep:
        start = self._random.choice([0, self._random.randint(0, MAX_LEN - size)])
        tokens = tuple(self._random.randrange(self._vocab) for _ in range(size))
        spec = self._random.choice([None, self._spec(), self._spec()])
        part = self._step(slot, tokens, start, spec)
        wanted = self._random.choice([None, None, None, "logprobs", "vector", "logits"])
        if wanted == "logprobs":
            first = self._random.randrange(size)
            part = part._replace(
                prompt_request=PromptLogprobsSpec(first, (1,) * (size - first), self._random.randint(0, 5))
            )
        elif wanted is not None and spec is None:
            part = part._replace(prompt_request=PoolingParams(logits_of=(1, 2) if wanted == "logits" else ()))
        return part

    def _step(self, slot: int, tokens: tuple[int, ...], start: int, spec: SampleSpec | None) -> SequenceStep:
        draw = self._random
        blocks = -(-(start + len(tokens)) // BLOCK_SIZE)
        first = draw.randrange(BLOCKS - blocks)
        made = None
        if spec is not None and slot == 0 and draw.random() < 0.2:
            made = setup(
                min_p=draw.choice([0.0, 0.1]),
                repetition_penalty=draw.choice([1.0, 1.2]),
                logit_bias=draw.choice([(), ((5, 1.0),)]),
                prompt=(1,) * draw.randint(1, 9),
            )
        return SequenceStep(
            seq_id=draw.randrange(1 << 30),
            slot=slot,
            token_ids=tokens,
            start=start,
            new_blocks=tuple(range(first, first + blocks)),
            sample=spec,
            setup=made,
        )

    def _spec(self) -> SampleSpec:
        draw = self._random
        return SampleSpec(
            temperature=draw.choice([0.0, 0.0, 0.7, 1.0]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 0, 1, 20, 1000, 5000]),
            seed=draw.randrange(1 << 20),
            position=draw.randrange(MAX_LEN),
            logprobs=draw.choice([None, None, None, 0, 3]),
        )


def serve(
    model: str, card: int, quantize: str | None, layout: str, dispatch: str, guesses: int, steps: int
) -> dict[str, Any]:
    """Variants of each kernel when the rank is ready, and how many more each later step compiled."""
    from benchmarks.compare.checkpoints import SHAPES
    from qwen3_dist.config import ModelConfig
    from qwen3_dist.settings import EngineConfig
    from qwen3_dist.speculation import Speculation
    from qwen3_dist.worker.runner import ModelRunner

    config = ModelConfig.from_dict({**SHAPES[model], "num_hidden_layers": 1})
    with fake_gpu(card, watched=False), without_numbers():
        rank = built_model(config, torch.bfloat16, connected(layout, 0), quantize)
        settings = EngineConfig(
            model="",
            layout=Layout.parse(layout),
            block_size=BLOCK_SIZE,
            max_model_len=MAX_LEN,
            max_num_batched_tokens=MAX_TOKENS,
            max_num_seqs=MAX_SEQS,
            moe_dispatch=dispatch,
            speculative=Speculation.parse(f"ngram,k={guesses}") if guesses else None,
        )
        began = time.process_time()
        runner = ModelRunner(rank, BLOCKS, settings, path=Path())
        runner.warm_up()
        ready = dict(compiles.compiled)
        print(f"ready after {time.process_time() - began:.1f} s", file=sys.stderr)
        before = runner.compiled_kernels()
        traffic = Traffic(0, settings.layout.dp, guesses, config.vocab_size)
        late = []
        for step in range(steps):
            runner.launch(traffic.plan(step)._replace(exact=runner.may_repeat and step % 3 == 0))
            if runner.compiled_kernels() > before:
                before = runner.compiled_kernels()
                more = {name: n - ready.get(name, 0) for name, n in compiles.compiled.items()}
                late.append({"step": step, "compiled": {name: n for name, n in more.items() if n}})
        print(f"served after {time.process_time() - began:.1f} s", file=sys.stderr)
    return {"ready": ready, "late": late}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=("dense", "moe"))
    parser.add_argument("--card", type=int, default=90)
    parser.add_argument("--quantize")
    parser.add_argument("--layout", default="tp=1")
    parser.add_argument("--dispatch", default="auto")
    parser.add_argument("--guesses", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    json.dump(serve(**vars(options)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
