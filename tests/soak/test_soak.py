"""Thousands of random requests with aborts through a real sharded engine: `make soak`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tqdm import tqdm

from qwen3_dist import SamplingParams
from qwen3_dist.engine.engine import Engine
from qwen3_dist.layout import Layout
from qwen3_dist.model.reference import load_reference
from qwen3_dist.request_terms import RequestTerms
from qwen3_dist.settings import EngineConfig
from qwen3_dist.speculation import Speculation
from tests.checkpoints import write_checkpoint

REQUESTS = 5000
PROMPTS = 200
LENGTH = 20


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("moe", "layout", "speculative"),
    [
        (False, "tp=1", None),
        (True, "tp=2,ep=2", None),
        (False, "pp=2", None),
        (True, "dp=2,ep=2", None),
        (False, "pp=2", "ngram,min=1"),
        (True, "dp=2,ep=2", "ngram,min=1"),
    ],
)
def test_after_thousands_of_requests_every_block_is_free_and_every_token_right(
    tmp_path: Path, moe: bool, layout: str, speculative: str | None
) -> None:
    """Where there are dp groups, experts have copies and move all the while."""
    parsed = Layout.parse(layout)
    path = write_checkpoint(tmp_path, moe=moe)
    rng = random.Random(0)
    trunks = [[rng.randrange(199) for _ in range(rng.randint(1, 60))] for _ in range(20)]
    tails = [[rng.randrange(199) for _ in range(rng.randint(1, 12))] for _ in range(PROMPTS)]
    prompts = [rng.choice(trunks) + tail for tail in tails]
    reference = load_reference(path)
    expected = [reference.generate_greedy(prompt, LENGTH) for prompt in prompts]
    config = EngineConfig(
        model=str(path),
        layout=parsed,
        redundant_experts=2 if parsed.dp > 1 else 0,
        rebalance_experts_s=1.0 if parsed.dp > 1 else None,
        executor="in_process" if layout == "tp=1" else "processes",
        block_size=4,
        num_blocks=120 // parsed.dp,
        max_num_seqs=16 // parsed.dp,
        max_num_batched_tokens=64,
        speculative=Speculation.parse(speculative) if speculative else None,
    )
    engine = Engine(config)
    try:
        asked: dict[str, int] = {}
        got: dict[str, list[int]] = {}
        added = aborted = finished = 0
        with tqdm(total=REQUESTS, desc="requests") as bar:
            while added < REQUESTS or engine.has_work:
                for _ in range(rng.randint(0, 3) if added < REQUESTS and len(asked) < 60 else 0):
                    which, length = rng.randrange(PROMPTS), rng.randint(1, LENGTH)
                    params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
                    engine.add_request(
                        str(added), prompts[which], params, RequestTerms(priority=rng.randint(-2, 2))
                    )
                    asked[str(added)], got[str(added)] = which, []
                    added += 1
                if asked and rng.random() < 0.1:
                    victim = rng.choice(list(asked))
                    assert engine.abort(victim)
                    del asked[victim]
                    aborted += 1
                for request_id, deltas in engine.step().items():
                    got[request_id].extend(deltas[0].token_ids)
                    right = expected[asked[request_id]]
                    assert got[request_id] == right[: len(got[request_id])]
                    if deltas[0].finish_reason is not None:
                        del asked[request_id]
                        finished += 1
                engine.check_integrity()
                bar.update(added - bar.n)
        stats = engine.stats()
    finally:
        engine.shutdown()
    assert finished + aborted >= REQUESTS and not asked
    assert stats.free_blocks == stats.total_blocks
    assert (stats.accepted_tokens > 0) == (speculative is not None)
    assert stats.preemptions > 0 and stats.cached_prompt_tokens > 0 and aborted > 100
