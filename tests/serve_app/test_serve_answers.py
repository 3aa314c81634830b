"""The endpoint through the official client: streamed, unstreamed and offline answers are one and the same."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from qwen3_dist.llm import LLM
from qwen3_dist.sampling_params import SamplingParams
from tests.serve_app.conftest import ADAPTER
from tests.serve_app.support import SETTINGS

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the sea. 海について 🌊"}]
PROMPT = "def main():\n    "
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
GREEDILY = SamplingParams(**GREEDY)
SILENT: dict[str, Any] = {"enable_thinking": False}
CHAT: dict[str, Any] = {"messages": MESSAGES, "extra_body": SILENT}


@pytest.fixture(scope="module")
def offline() -> Iterator[LLM]:
    with LLM(dtype="float32", device="cpu", num_blocks=512, use_tqdm=False) as llm:
        yield llm


def streamed_chat(client: openai.OpenAI, **request: Any) -> dict[int, tuple[str, str | None]]:
    """Text and finish reason of every choice of a streamed chat."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in client.chat.completions.create(stream=True, **request):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return {index: (texts[index], reasons[index]) for index in texts}


def test_a_chat_streamed_equals_unstreamed_equals_offline(
    client: openai.OpenAI, model: str, offline: LLM
) -> None:
    request = {"model": model, **CHAT, **GREEDY}
    whole = client.chat.completions.create(**request)
    expected = offline.chat(MESSAGES, GREEDILY, use_tqdm=False, **SILENT)[0]
    assert whole.choices[0].message.content == expected.text
    assert streamed_chat(client, **request) == {0: (expected.text, expected.finish_reason)}
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert whole.usage.completion_tokens == len(expected.token_ids)


def test_a_completion_streamed_equals_unstreamed_equals_offline(
    client: openai.OpenAI, model: str, offline: LLM
) -> None:
    request: dict[str, Any] = {"model": model, "prompt": PROMPT, **GREEDY}
    expected = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0]
    assert client.completions.create(**request).choices[0].text == expected.text
    chunks = list(client.completions.create(stream=True, **request))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text


def test_token_ids_and_text_make_the_same_prompt(client: openai.OpenAI, model: str, offline: LLM) -> None:
    ids = offline.generate(PROMPT, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids
    answer = client.completions.create(model=model, prompt=[PROMPT, ids], **GREEDY)  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == answer.choices[1].text


def test_the_async_client_is_answered_alike_however_many_ask_at_once(
    url: str, client: openai.OpenAI, model: str
) -> None:
    alone = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)

    async def ask_together() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asynchronous:

            async def stream() -> str:
                chunks = await asynchronous.chat.completions.create(
                    model=model, messages=MESSAGES, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            whole = asynchronous.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
            answer, *texts = await asyncio.gather(whole, stream(), stream(), stream())
            return [answer.choices[0].message.content, *texts]

    assert set(asyncio.run(ask_together())) == {alone.choices[0].message.content}


def test_n_choices_are_told_apart_by_index_and_repeat_with_their_seed(
    client: openai.OpenAI, model: str, offline: LLM
) -> None:
    request: dict[str, Any] = {"model": model, "messages": MESSAGES, "n": 3, "seed": 11, "max_tokens": 12}
    request |= {
        "temperature": 1,
        "top_p": 1,
        "extra_body": {**SILENT, "top_k": 0},
    }  # not the checkpoint's own
    whole = client.chat.completions.create(**request)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = streamed_chat(client, **request)
    assert [streamed[index][0] for index in range(3)] == texts
    params = SamplingParams(n=3, seed=11, max_tokens=12, temperature=1)
    assert [o.text for o in offline.chat(MESSAGES, params, use_tqdm=False, **SILENT)[0].outputs] == texts


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model: str, offline: LLM) -> None:
    text = offline.chat(MESSAGES, GREEDILY, use_tqdm=False, **SILENT)[0].text
    assert text is not None
    stop = text[len(text) // 2 :][:3]
    request = {"model": model, **CHAT, "stop": stop, **GREEDY}
    shown = text[: text.index(stop)]
    assert streamed_chat(client, **request) == {0: (shown, "stop")}
    assert client.chat.completions.create(**request).choices[0].message.content == shown


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {"model": model, "messages": MESSAGES, "stream": True, **GREEDY}
    *chunks, last = client.chat.completions.create(stream_options={"include_usage": True}, **request)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 24
    assert all(chunk.usage is None and chunk.choices for chunk in client.chat.completions.create(**request))


def test_chat_logprobs_are_the_offline_ones(client: openai.OpenAI, model: str, offline: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    expected = offline.chat(MESSAGES, params, use_tqdm=False, **SILENT)[0].logprobs
    request = {"model": model, **CHAT, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **request)
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and expected is not None
    assert [p.logprob for p in content] == pytest.approx([p.logprob for p in expected], abs=1e-4)
    assert all(len(p.top_logprobs) == 2 and p.top_logprobs[0].token == p.token for p in content)
    assert bytes(b for p in content for b in p.bytes or ()).decode(errors="replace") == (
        answer.choices[0].message.content
    )
    chunks = client.chat.completions.create(logprobs=True, stream=True, **request)
    tokens = [p.token for c in chunks if c.choices[0].logprobs for p in c.choices[0].logprobs.content or ()]
    assert tokens == [p.token for p in content]


def test_completion_logprobs_come_in_columns(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    choice = client.completions.create(logprobs=2, **request).choices[0]
    columns = choice.logprobs
    assert columns is not None and columns.tokens and columns.text_offset and columns.top_logprobs
    assert len(columns.token_logprobs or ()) == len(columns.top_logprobs) == 6
    for token, offset in zip(columns.tokens, columns.text_offset, strict=True):
        assert choice.text[offset:].startswith(token) or "\ufffd" in token


def test_tools_and_template_switches_reach_the_chat_template(client: openai.OpenAI, model: str) -> None:
    def prompt_tokens(**extra: Any) -> int:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1, **extra)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
    assert prompt_tokens(tools=[tool]) > prompt_tokens()
    no_thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_tokens(extra_body=no_thinking) > prompt_tokens()


def test_the_stream_is_events_that_end_with_done(http: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_models_and_health_are_listed(client: openai.OpenAI, http: httpx.Client, model: str) -> None:
    assert [m.id for m in client.models.list()] == [model, ADAPTER]
    assert client.models.retrieve(model).id == model
    assert http.get("/health").status_code == 200


def test_nothing_is_left_in_the_engine_after_its_answers(idle: Callable[[], bool]) -> None:
    assert idle()


def test_each_replica_tells_where_its_ranks_run_and_how_they_talk(http: httpx.Client) -> None:
    answer = http.get("/v1/cluster/ranks")
    assert answer.status_code == 200
    for replica in answer.json()["data"]:
        assert replica["layout"] == SETTINGS["layout"]
        assert replica["backends"].startswith("CPU") and replica["collectives"] == "shared memory"
        assert [rank["rank"] for rank in replica["ranks"]] == [0, 1]
        for rank in replica["ranks"]:
            assert rank["card"] is None and rank["host"] == socket.gethostname()
            os.kill(rank["pid"], 0)  # that it runs here


def test_the_experts_load_can_be_read_and_rebalanced(
    client: openai.OpenAI, http: httpx.Client, model: str
) -> None:
    def tokens() -> int:
        """Choices of experts in the first MoE layer so far, over all replicas."""
        answer = http.get("/v1/cluster/experts")
        assert answer.status_code == 200
        return sum(sum(next(iter(replica["tokens"].values()))) for replica in answer.json()["data"])

    before = tokens()
    request: dict[str, Any] = {"model": model, "prompt": PROMPT, **GREEDY}
    answer = client.completions.create(**request)
    assert answer.usage is not None
    computed = answer.usage.total_tokens - 1  # the last token is not computed
    assert 0 < tokens() - before <= computed * 2
    rebalanced = http.post("/v1/cluster/experts/rebalance")
    assert rebalanced.status_code == 200 and all(
        isinstance(layers, list) for layers in rebalanced.json()["data"]
    )
    assert client.completions.create(**request).choices[0].text == answer.choices[0].text
