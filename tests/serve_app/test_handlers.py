"""Answering requests on one replica, apart from Ray and HTTP: a real engine in this process."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import resolve_model
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import CompletionAnswer, CompletionRequest, parse_completion
from serve_app.apis.shared.answer import DONE
from serve_app.apis.shared.prompts import PromptRenderer
from serve_app.replica.record import RequestRecord
from serve_app.replica.request_handler import RequestHandler
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


@pytest.mark.parametrize(
    ("fields", "num_bytes", "in_a_thread"),
    [({}, 1000, False), ({}, 10**5, True), ({"response_format": {"type": "json_object"}}, 1000, True)],
)
def test_only_short_requests_that_need_no_grammar_are_read_on_the_event_loop(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, fields: Any, num_bytes: int, in_a_thread: bool
) -> None:
    threads: list[threading.Thread] = []
    answering = handler(engine)
    read = answering._read

    def noted(request: Any) -> Any:
        threads.append(threading.current_thread())
        return read(request)

    monkeypatch.setattr(answering, "_read", noted)
    request = parse_chat(json.dumps({"messages": MESSAGES, "max_tokens": 1, **fields}).encode())
    asyncio.run(answering.respond(request, RequestRecord(num_bytes=num_bytes)))
    assert [thread is not threading.main_thread() for thread in threads] == [in_a_thread]


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
    assert items[0] == b""  # the request is accepted
    assert len(items) <= engine.stats().steps - before + 2


def test_a_whole_answer_is_built_off_the_event_loop(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    whole = CompletionAnswer.full_response

    def build(answer: CompletionAnswer, choices: Any) -> Any:
        threads.append(threading.current_thread().name)
        return whole(answer, choices)

    monkeypatch.setattr(CompletionAnswer, "full_response", build)
    assert respond(engine, max_tokens=3, logprobs=20, echo=True)["choices"]
    assert threads and threads[0] != threading.current_thread().name


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6], [7, 8], "the sea"]])
def test_leaving_a_stream_frees_every_sequence_of_it(engine: AsyncEngine, prompt: Any) -> None:
    async def leave_early() -> None:
        request = completion(prompt=prompt, n=2, max_tokens=4000, stream=True, ignore_eos=True)
        stream = handler(engine).stream(request)
        assert await anext(stream) == b""  # it is accepted
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


@pytest.mark.parametrize(("prompt_len", "num_items"), [(4000, 1), (2, 2)])  # before and after the first event
def test_an_engine_that_dies_is_raised_so_that_another_goes_on(prompt_len: int, num_items: int) -> None:
    async def outlive(engine: AsyncEngine) -> None:
        asked = completion(
            prompt=[5] * prompt_len, max_tokens=4096 - prompt_len, stream=True, ignore_eos=True
        )
        stream = handler(engine).stream(asked)
        assert [bool(await anext(stream)) for _ in range(num_items)] == [False, True][:num_items]
        await asyncio.to_thread(engine.shutdown)
        await collect(stream)

    engine = started()
    with pytest.raises(EngineDeadError):
        asyncio.run(outlive(engine))
    with pytest.raises(EngineDeadError):
        respond(engine)


def test_a_checkpoint_without_a_tokenizer_answers_with_token_ids(wordless: AsyncEngine) -> None:
    choice = respond(wordless, max_tokens=5, ignore_eos=True, logprobs=1)["choices"][0]
    assert choice["text"] == "" and len(choice["token_ids"]) == 5
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    asked = completion(max_tokens=5, ignore_eos=True, stream=True)
    events = b"".join(asyncio.run(collect(handler(wordless).stream(asked)))).split(b"\n\n")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events if event.startswith(b"data: {")]
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


def test_a_limit_that_the_context_does_not_hold_is_told_both_numbers(engine: AsyncEngine) -> None:
    error = refused(handler(engine).respond(completion(prompt=[5] * 4000, max_tokens=200)))
    assert error.param == "max_tokens"
    assert all(number in str(error) for number in ("200", "4000", "4096"))
    body = {"messages": MESSAGES, "max_completion_tokens": 5000}
    asked = parse_chat(json.dumps(body).encode())
    assert refused(handler(engine).respond(asked)).param == "max_completion_tokens"


def test_a_default_limit_is_cut_to_what_the_context_holds(engine: AsyncEngine) -> None:
    answer = respond(engine, prompt=[5] * 4090, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 6


def test_a_text_that_cannot_fit_is_refused_without_being_tokenized(engine: AsyncEngine) -> None:
    error = refused(handler(engine).respond(completion(prompt="a" * 10_000_000)))
    assert error.param == "prompt" and "10000000 characters" in str(error)


def test_a_final_message_is_continued_where_it_ends(engine: AsyncEngine) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The sea is"}]
    asked = parse_chat(json.dumps({"messages": messages, "continue_final_message": True}).encode())
    assert engine.tokenizer and engine.chat_template
    [prompt] = asked.prompts(PromptRenderer(engine.tokenizer, engine.chat_template, engine.max_model_len))
    assert prompt.text is not None and prompt.text.endswith("The sea is")


def test_the_service_says_whether_the_model_thinks_where_a_request_does_not(engine: AsyncEngine) -> None:
    def prompt(**fields: Any) -> str | None:
        asked = parse_chat(json.dumps({"messages": MESSAGES, **fields}).encode())
        renderer = PromptRenderer(
            engine.tokenizer, engine.chat_template, engine.max_model_len, {"enable_thinking": False}
        )
        return asked.prompts(renderer)[0].text

    assert prompt() == prompt(enable_thinking=False) != prompt(enable_thinking=True)


def test_token_ids_and_their_names_come_where_they_are_asked_for(engine: AsyncEngine) -> None:
    asked = {"max_tokens": 4, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = respond(engine, **asked)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]


def test_what_ended_a_choice_is_told(engine: AsyncEngine) -> None:
    whole = respond(engine, max_tokens=8, return_token_ids=True)["choices"][0]
    assert whole["stop_reason"] is None
    text, token = whole["text"][2:4], whole["token_ids"][3]
    stopped = respond(engine, max_tokens=8, stop=text)["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", text)
    shown = respond(engine, max_tokens=8, stop=text, include_stop_str_in_output=True)["choices"][0]
    assert shown["text"] == stopped["text"] + text
    stopped = respond(engine, max_tokens=8, stop_token_ids=[token])["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", token)


def test_a_streams_chunks_count_tokens_as_far_as_they_are_asked_to(engine: AsyncEngine) -> None:
    def counts(**options: Any) -> list[Any]:
        request = completion(max_tokens=4, stream=True, ignore_eos=True, stream_options=options)
        items = asyncio.run(collect(handler(engine).stream(request)))
        chunks = [json.loads(item) for item in b"".join(items).decode().split("data: ")[1:-1]]
        return [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]

    assert counts(include_usage=True)[-2:] == [None, 4]
    tries = [counts(include_usage=True, continuous_usage_stats=True) for _ in range(8)]
    for told in tries:
        assert told == sorted(told) and told[-2:] == [4, 4]
    assert any(told[0] < 4 for told in tries)  # a busy machine may read several steps at once


def test_usage_says_what_the_prefix_cache_had(engine: AsyncEngine) -> None:
    prompt = list(range(5, 105))
    respond(engine, prompt=prompt, max_tokens=1)
    details = respond(engine, prompt=prompt, max_tokens=1, n=2)["usage"]["prompt_tokens_details"]
    assert 0 < details["cached_tokens"] < 100


@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt_ahead_of_each_choice(engine: AsyncEngine, stream: bool) -> None:
    plain = respond(engine, prompt=["the sea", "a fox"], n=2, max_tokens=4)["choices"]
    fields: dict[str, Any] = {"prompt": ["the sea", "a fox"], "n": 2, "max_tokens": 4, "echo": True}
    if stream:
        items = asyncio.run(collect(handler(engine).stream(completion(stream=True, **fields))))
        texts = [""] * 4
        for chunk in b"".join(items).decode().split("data: ")[1:-1]:
            for choice in json.loads(chunk)["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in respond(engine, **fields)["choices"]]
    prompts = ["the sea", "the sea", "a fox", "a fox"]
    assert texts == [prompt + choice["text"] for prompt, choice in zip(prompts, plain, strict=True)]


def test_a_text_is_scored_without_generating_anything(engine: AsyncEngine) -> None:
    fields: dict[str, Any] = {"prompt": ["the sea is blue", [5, 6]], "echo": True, "logprobs": 2}
    answer = respond(engine, **fields, max_tokens=0)
    assert answer["usage"]["completion_tokens"] == 0
    for choice, longer in zip(
        answer["choices"], respond(engine, **fields, max_tokens=3)["choices"], strict=True
    ):
        columns = choice["logprobs"]
        assert choice["finish_reason"] == "length" and longer["text"].startswith(choice["text"])
        assert columns["token_logprobs"][0] is None
        assert all(value < 0 for value in columns["token_logprobs"][1:])
        for token, top in zip(columns["tokens"][1:], columns["top_logprobs"][1:], strict=True):
            assert 2 <= len(top) <= 3 and token in top  # the two likeliest, and it
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert longer["logprobs"][name][: len(columns["tokens"])] == pytest.approx(columns[name])
    assert answer["choices"][0]["text"] == "the sea is blue"


def test_scores_of_a_prompt_come_once_for_all_its_choices(engine: AsyncEngine) -> None:
    [choice, other] = respond(engine, prompt_logprobs=1, n=2, max_tokens=2)["choices"]
    assert choice["prompt_logprobs"] == other["prompt_logprobs"]
    assert choice["prompt_logprobs"][0] is None and "6" in choice["prompt_logprobs"][1]
