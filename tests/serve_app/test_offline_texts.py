"""A text is the same offline, answered as a whole and streamed, whatever ends it."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from tests.serve_app.test_handlers import STORY, collect, completion, handler, respond, started

SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_blocks": 256}
SAMPLED = {"n": 3, "seed": 5, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = started()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(use_tqdm=False, **SETTINGS) as llm:
        yield llm


def streamed(engine: AsyncEngine, fields: dict[str, Any]) -> list[tuple[str, str | None]]:
    items = asyncio.run(collect(handler(engine).stream(completion(prompt=STORY, stream=True, **fields))))
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, str | None] = {}
    for chunk in b"".join(items).decode().split("data: ")[1:-1]:
        for choice in json.loads(chunk)["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    return [(texts[index], reasons[index]) for index in sorted(texts)]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 12])
def test_offline_and_served_texts_end_alike(
    engine: AsyncEngine, llm: LLM, include: bool, min_tokens: int
) -> None:
    first = llm.generate(STORY, SamplingParams(**SAMPLED), use_tqdm=False)[0].outputs[0]
    assert first.text is not None
    stop = first.text[4:7]  # within the first tokens
    fields = {**SAMPLED, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    params = SamplingParams(**fields, stop=(stop,))
    offline = [
        (choice.text, choice.finish_reason)
        for choice in llm.generate(STORY, params, use_tqdm=False)[0].outputs
    ]
    answered = [
        (choice["text"], choice["finish_reason"])
        for choice in respond(engine, prompt=STORY, stop=[stop], **fields)["choices"]
    ]
    assert offline == answered == streamed(engine, {**fields, "stop": [stop]})
    text, reason = offline[0]
    assert text is not None
    if min_tokens:
        assert stop in text[:7] and len(text) > 7  # it did not count so early
    else:
        assert (text, reason) == (first.text[: 7 if include else 4], "stop")
