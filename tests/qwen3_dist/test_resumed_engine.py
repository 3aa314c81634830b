"""An engine goes on with what another engine began: the same tokens and ends, log-probabilities but for rounding."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from qwen3_dist import SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.settings import EngineConfig

PROMPT = [*range(20, 46), 3, 99, 7]
LOOP = [5, 6, 7, 8] * 6
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_tokens": 40}
CASES = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, logprobs=2, ignore_eos=True),
    "drawn": SamplingParams(**DRAWN, logprobs=2, top_k=50),
    "penalties": SamplingParams(
        **DRAWN,
        presence_penalty=1,
        frequency_penalty=0.7,
        repetition_penalty=1.4,
        min_p=0.01,
        ignore_eos=True,
    ),
    "bad words": SamplingParams(
        **DRAWN, bad_words=("the", "the old"), logit_bias=((30, 2.0),), min_tokens=20
    ),
    "grammar": SamplingParams(
        **DRAWN, structured_outputs=StructuredOutputs(regex="[a-z]{3,9}( [0-9]{2,5}){4}")
    ),
    "budget": SamplingParams(
        **DRAWN,
        reasoning="open",
        thinking_token_budget=13,
        structured_outputs=StructuredOutputs(
            json={"type": "array", "items": {"type": "integer"}, "minItems": 5}
        ),
    ),
    "scored names": SamplingParams(**DRAWN, logprob_token_ids=(4, 9)),
}
pytestmark = pytest.mark.usefixtures("nursery")


def started(**settings: Any) -> AsyncEngine:
    config = {"device": "cpu", "dtype": "float32", "num_blocks": 256, **settings}
    return AsyncEngine(EngineConfig(**config))


@pytest.fixture(scope="module")
def engines() -> Iterator[list[AsyncEngine]]:
    """The first begins; the second reads prompts in small chunks, and has a cache that gets full of them."""
    engines = [started(), started(max_num_batched_tokens=8)]
    yield engines
    for engine in engines:
        engine.shutdown()


Outputs = dict[int, list[TokenDelta]]


def generated(
    engine: AsyncEngine,
    prompt: list[int],
    params: SamplingParams,
    resume: Mapping[int, Sequence[int]] | None = None,
) -> Outputs:
    """The deltas of each choice."""

    async def collect() -> Outputs:
        found: Outputs = {}
        async for step in engine.generate(prompt, params, "r", resume=resume):
            for delta in step:
                found.setdefault(delta.index, []).append(delta)
        return found

    return asyncio.run(collect())


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def scores(deltas: list[TokenDelta]) -> list[float]:
    """All log-probabilities, with the tokens that they are of. The tokens were read in chunks of other sizes."""
    scored = [each for delta in deltas for each in delta.logprobs]
    return [n for each in scored for pair in ((each.token_id, each.logprob), *each.top) for n in pair]


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_after_any_token(engines: list[AsyncEngine], name: str) -> None:
    params = CASES[name]
    first, second = engines
    [whole] = generated(first, PROMPT, params).values()
    expected = tokens(whole)
    assert len(expected) > 12
    for cut in range(0, len(expected), 1 if name == "drawn" else 3):
        [rest] = generated(second, PROMPT, params, {0: expected[:cut]}).values()
        assert tokens(rest) == expected[cut:]
        assert scores(rest) == pytest.approx(scores(whole[cut:]), abs=1e-4)
        assert rest[-1].finish_reason == whole[-1].finish_reason
        assert all(delta.num_cached_tokens <= len(PROMPT) for delta in rest)


def test_each_choice_goes_on_where_it_was(engines: list[AsyncEngine]) -> None:
    params = SamplingParams(**DRAWN, n=4, ignore_eos=True)
    first, second = engines
    whole = {index: tokens(deltas) for index, deltas in generated(first, PROMPT, params).items()}
    assert len({tuple(each) for each in whole.values()}) == 4
    begun = {3: whole[3][:9], 0: whole[0][:30], 1: ()}  # choice 2 is finished
    rest = generated(second, PROMPT, params, begun)
    assert {index: tokens(deltas) for index, deltas in rest.items()} == {
        index: whole[index][len(output) :] for index, output in begun.items()
    }
    stats = second.stats()
    assert stats.num_running + stats.num_waiting == 0 and stats.free_blocks == stats.total_blocks


def test_an_output_that_is_complete_ends_at_once(engines: list[AsyncEngine]) -> None:
    engine = engines[1]
    [eos, *_] = engine.tokenizer.eos_token_ids  # type: ignore[union-attr]
    params = SamplingParams(n=5, max_tokens=4, temperature=0, stop_token_ids=(77,))
    before = engine.stats().generation_tokens
    ended = generated(engine, PROMPT, params, {0: [5, 6, 7, 8], 2: [5, 77], 3: [5, eos]})
    assert {index: [(d.token_ids, d.finish_reason) for d in deltas] for index, deltas in ended.items()} == {
        0: [((), "length")],
        2: [((), "stop")],
        3: [((), "stop")],
    }
    assert engine.stats().generation_tokens == before
    [rest] = generated(engine, PROMPT, SamplingParams(max_tokens=4, ignore_eos=True), {0: [5, eos]}).values()
    assert len(tokens(rest)) == 2 and rest[-1].finish_reason == "length"


def test_prompt_log_probabilities_come_once(engines: list[AsyncEngine]) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1)
    [whole] = generated(engines[0], PROMPT, params).values()
    assert whole[0].prompt_logprobs is not None
    [rest] = generated(engines[1], PROMPT, params, {0: tokens(whole)[:2]}).values()
    assert [delta.prompt_logprobs for delta in rest] == [None] * len(rest)
    [anew] = generated(engines[1], PROMPT, params, {0: ()}).values()
    assert anew[0].prompt_logprobs == whole[0].prompt_logprobs


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "tp=2", "executor": "processes"},
        {"layout": "pp=2", "executor": "processes"},
        {"speculative": "ngram,k=4,min=1"},
        {"block_size": 4, "num_blocks": 24, "max_num_seqs": 4},  # sequences that go on are preempted too
    ],
)
def test_another_kind_of_engine_goes_on(engines: list[AsyncEngine], settings: dict[str, Any]) -> None:
    params = SamplingParams(**{**DRAWN, "max_tokens": 30}, n=3, ignore_eos=True, frequency_penalty=0.3)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = {index: tokens(deltas) for index, deltas in generated(engines[0], PROMPT, params).items()}
    looped = tokens(generated(engines[0], LOOP, greedy)[0])
    other = started(**settings)
    try:
        rest = generated(other, PROMPT, params, {i: output[: 5 + i] for i, output in whole.items()})
        assert {i: tokens(deltas) for i, deltas in rest.items()} == {
            i: output[5 + i :] for i, output in whole.items()
        }
        assert tokens(generated(other, LOOP, greedy, {0: looped[:7]})[0]) == looped[7:]
        stats = other.stats()
        assert stats.accepted_tokens > 0 if "speculative" in settings else True
        assert stats.preemptions > 0 if "num_blocks" in settings else True
    finally:
        other.shutdown()


def test_what_does_not_fit_is_refused(engines: list[AsyncEngine]) -> None:
    engine = engines[0]
    long = [5] * (engine.max_model_len - len(PROMPT))
    with pytest.raises(RequestError, match="the answer cannot go on here"):
        generated(engine, PROMPT, SamplingParams(max_tokens=None), {0: long})
    [ended] = generated(engine, PROMPT, SamplingParams(max_tokens=len(long)), {0: long}).values()
    assert ended[-1].finish_reason == "length"
    with pytest.raises(RequestError, match="4096 is outside the vocabulary"):
        generated(engine, PROMPT, SamplingParams(), {0: [5, 4096]})
    [last] = generated(
        engine, PROMPT, SamplingParams(max_tokens=None, ignore_eos=True), {0: long[1:]}
    ).values()
    assert len(tokens(last)) == 1 and last[-1].finish_reason == "length"
