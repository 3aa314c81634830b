"""Answering requests on one replica, apart from Ray and HTTP: a real engine in this process."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import resolve_model
from serve_app.answers.base import DONE
from serve_app.handlers import RequestHandler
from serve_app.protocol.chat import parse_chat
from serve_app.protocol.completions import CompletionRequest, parse_completion
from tests.serve_app.support import wait_for

MESSAGES = [{"role": "user", "content": "hi"}]
# Its answers differ.
STORY = (
    "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def started(model: str | Path = "") -> AsyncEngine:
    return AsyncEngine(EngineConfig(model=str(model), device="cpu", dtype="float32", num_blocks=256))


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = started()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    """An engine whose checkpoint has no tokenizer."""
    path = tmp_path_factory.mktemp("wordless")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(resolve_model("") / name, path)
    engine = started(path)
    yield engine
    engine.shutdown()


def handler(engine: AsyncEngine) -> RequestHandler:
    return RequestHandler(engine, "m", {})


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": [5, 6], "temperature": 0, **fields}).encode())


def respond(engine: AsyncEngine, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(asyncio.run(handler(engine).respond(completion(**fields))))
    return answer


async def collect(stream: AsyncGenerator[bytes, None]) -> list[bytes]:
    return [item async for item in stream]


def is_idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.num_running + stats.num_waiting == 0 and stats.free_blocks == stats.total_blocks


def refused(work: Coroutine[Any, Any, Any]) -> RequestError:
    with pytest.raises(RequestError) as error:
        asyncio.run(work)
    return error.value


def test_each_choice_stops_at_its_own_stop_string(engine: AsyncEngine) -> None:
    sampled = {"prompt": STORY, "temperature": 1, "seed": 5, "n": 4, "max_tokens": 60, "ignore_eos": True}
    whole = [choice["text"] for choice in respond(engine, **sampled)["choices"]]
    stopped = respond(engine, **sampled, stop=["er", "."])["choices"]
    for text, choice in zip(whole, stopped, strict=True):
        at = min((text.index(stop) for stop in ("er", ".") if stop in text), default=None)
        assert choice["text"] == text[:at]
        assert choice["finish_reason"] == ("length" if at is None else "stop")
    assert len({len(choice["text"]) for choice in stopped}) > 1


def test_several_prompts_are_answered_in_their_order(engine: AsyncEngine) -> None:
    prompts = ["the sea", [7, 8, 9], "def f(x):"]
    together = respond(engine, prompt=prompts, n=2, max_tokens=8)
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    for position, prompt in enumerate(prompts):
        alone = respond(engine, prompt=prompt, max_tokens=8)["choices"][0]["text"]
        assert [c["text"] for c in together["choices"][2 * position :][:2]] == [alone, alone]
    assert together["usage"]["completion_tokens"] == 6 * 8


def test_one_item_crosses_per_step_however_many_choices_there_are(engine: AsyncEngine) -> None:
    before = engine.stats().steps
    request = completion(n=4, seed=1, temperature=1, max_tokens=10, stream=True, ignore_eos=True)
    items = asyncio.run(collect(handler(engine).stream(request)))
    assert items[-1].endswith(DONE)
    assert len(items) <= engine.stats().steps - before + 1


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6], [7, 8], "the sea"]])
def test_leaving_a_stream_frees_every_sequence_of_it(engine: AsyncEngine, prompt: Any) -> None:
    async def leave_early() -> None:
        request = completion(prompt=prompt, n=2, max_tokens=4000, stream=True, ignore_eos=True)
        stream = handler(engine).stream(request)
        await anext(stream)
        assert not is_idle(engine)
        await stream.aclose()

    before = engine.stats().steps
    asyncio.run(leave_early())
    wait_for(lambda: is_idle(engine))
    assert engine.stats().steps - before < 4000


def test_a_refusal_comes_before_the_first_item(engine: AsyncEngine) -> None:
    too_long = completion(prompt=[5] * 5000, stream=True)
    error = refused(collect(handler(engine).stream(too_long)))
    assert "5000" in str(error) and "4096" in str(error)


def test_a_refused_prompt_ends_the_others_of_its_request(engine: AsyncEngine) -> None:
    error = refused(handler(engine).respond(completion(prompt=[[5, 6], [5] * 5000], max_tokens=4000)))
    assert "5000" in str(error)
    wait_for(lambda: is_idle(engine))


def test_an_engine_that_dies_mid_stream_ends_it_with_an_error_event() -> None:
    async def outlive(engine: AsyncEngine) -> list[bytes]:
        stream = handler(engine).stream(completion(max_tokens=4000, stream=True, ignore_eos=True))
        items = [await anext(stream)]
        await asyncio.to_thread(engine.shutdown)
        return items + await collect(stream)

    engine = started()
    *_, last = asyncio.run(outlive(engine))
    error, done = last.strip().split(b"\n\n")
    assert json.loads(error.removeprefix(b"event: error\ndata: "))["error"]["type"] == "server_error"
    assert done == DONE.strip()
    with pytest.raises(EngineDeadError):
        respond(engine)


def test_a_checkpoint_without_a_tokenizer_answers_with_token_ids(wordless: AsyncEngine) -> None:
    choice = respond(wordless, max_tokens=5, logprobs=1)["choices"][0]
    assert choice["text"] == "" and len(choice["token_ids"]) == 5
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    items = asyncio.run(collect(handler(wordless).stream(completion(max_tokens=5, stream=True))))
    chunks = [json.loads(item.removeprefix(b"data: ")) for item in items[:-1]]
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == choice["token_ids"]


def test_a_checkpoint_without_a_tokenizer_refuses_what_needs_text(wordless: AsyncEngine) -> None:
    chat = parse_chat(json.dumps({"model": "m", "messages": MESSAGES}).encode())
    assert refused(handler(wordless).respond(chat)).param == "messages"
    assert refused(handler(wordless).respond(completion(prompt="hi"))).param == "prompt"
    assert refused(handler(wordless).respond(completion(stop="x"))).param == "stop"


def test_a_choice_that_a_stop_string_ends_leaves_the_engine_while_its_sibling_goes_on(
    engine: AsyncEngine,
) -> None:
    seeded = {"prompt": STORY, "n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 400, "ignore_eos": True}
    first, second = (choice["text"] for choice in respond(engine, **seeded)["choices"])
    stop = next(first[i : i + 4] for i in range(len(first)) if first[i : i + 4] not in second)

    async def sibling_ran_alone() -> bool:
        stream = handler(engine).stream(completion(stop=stop, stream=True, **seeded))
        return any([engine.stats().num_running == 1 async for _ in stream])

    assert asyncio.run(sibling_ran_alone())
    assert is_idle(engine)
