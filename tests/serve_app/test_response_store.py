"""Stored responses: later requests go on from them and refer to their items, until they are dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from qwen3_dist.errors import RequestError
from qwen3_dist.text.choice import ChoiceDelta, join
from serve_app.apis.responses.recorder import ResponseRecorder
from serve_app.apis.responses.request import read_responses
from serve_app.apis.responses.store import ResponseStore
from serve_app.apis.shared.answer import AnswerContext
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.apis.shared.prompts import Prompt

SAID = [
    ChoiceDelta(0, "", (1,), (), None, reasoning="Hm."),
    ChoiceDelta(0, "Hi!", (1,), (), None),
    ChoiceDelta(0, "", (2,), (), "stop"),
]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(kept: ResponseStore, stream: bool = False, **body: Any) -> dict[str, Any]:
    """The response to `body`, which says SAID whatever is asked."""
    exchange = ResponseRecorder(kept)
    request = exchange.parse(json.dumps({"model": "m", "stream": stream, **body}).encode())
    form = request.answer(AnswerContext("m", None, [Prompt([1])]))

    async def items() -> AsyncGenerator[Any, None]:
        if not stream:
            yield 200, to_json(form.full_response([join(SAID)]))
            return
        yield 200, form.begin()
        for delta in SAID:
            yield form.delta(delta)
        yield form.end()

    async def collect() -> bytes:
        return b"".join(
            [part[1] if isinstance(part, tuple) else part async for part in exchange.record(items())]
        )

    told = asyncio.run(collect())
    last = told.rpartition(b"data: ")[2] if stream else told
    response: dict[str, Any] = json.loads(last)
    return response["response"] if stream else response


def messages(store: ResponseStore, **body: Any) -> list[dict[str, Any]]:
    return read_responses(json.dumps({"model": "m", **body}).encode(), store).request.messages


def refusal(store: ResponseStore, **body: Any) -> dict[str, Any]:
    with pytest.raises(RequestError) as error:
        messages(store, **body)
    assert error.value.status == 404
    told: dict[str, Any] = error_object(error.value)["error"]
    return told


def store(max_bytes: int = 2**20, clock: Clock | None = None) -> ResponseStore:
    return ResponseStore(max_bytes, 100, clock or Clock())


HELLO = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi!", "reasoning_content": "Hm."}
MORE = {"role": "user", "content": "More"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_a_stored_response(stream: bool) -> None:
    kept = store()
    first = asked(kept, stream, input="Hello", instructions="Be brief.")
    assert first["store"] is True
    second = asked(kept, stream, input=[MORE], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    turns = messages(kept, input="Go", previous_response_id=second["id"])
    assert turns == [HELLO, ANSWER, MORE, ANSWER, {"role": "user", "content": "Go"}]
    assert messages(kept, previous_response_id=first["id"]) == [HELLO, ANSWER]


@pytest.mark.parametrize("stream", [False, True])
def test_items_of_a_stored_response_may_be_referred_to(stream: bool) -> None:
    kept = store()
    output = asked(kept, stream, input="Hello")["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in output]
    second = asked(kept, stream, input=[HELLO, *references, MORE])
    assert messages(kept, input=[HELLO, *references, MORE]) == [HELLO, ANSWER, MORE]
    assert messages(kept, previous_response_id=second["id"]) == [HELLO, ANSWER, MORE, ANSWER]


@pytest.mark.parametrize("untyped", [{}, {"type": None}, {"type": None, "role": None, "content": None}])
def test_an_item_reference_needs_no_type(untyped: dict[str, Any]) -> None:
    kept = store()
    references = [{**untyped, "id": item["id"]} for item in asked(kept, input="Hello")["output"]]
    second = asked(kept, input=[HELLO, *references, MORE])
    assert messages(kept, previous_response_id=second["id"]) == [HELLO, ANSWER, MORE, ANSWER]
    assert refusal(kept, input=[{**untyped, "id": "msg_1"}])["message"].startswith("Item with id 'msg_1'")


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"id": "msg_1", "role": "user"}, "input[0].content"),
        ({"id": "msg_1", "content": "x"}, "input[0].role"),
        ({"id": ""}, "input[0].id"),
        ({}, "input[0].role"),
    ],
)
def test_an_untyped_item_that_is_no_reference_is_a_message(item: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        messages(store(), input=[item])
    assert refused.value.param == param


def test_a_response_can_be_read_again_and_deleted() -> None:
    kept = store()
    first = asked(kept, input="Hello")
    assert json.loads(kept.response(first["id"])) == first
    kept.delete(first["id"])
    for again in (kept.response, kept.delete):
        with pytest.raises(RequestError, match="not found") as missing:
            again(first["id"])
        assert missing.value.status == 404


def test_a_deleted_response_stays_for_those_that_follow_it_alone() -> None:
    kept = store()
    first = asked(kept, input="Hello")
    second = asked(kept, input=[MORE], previous_response_id=first["id"])
    third = asked(kept, input=[MORE], previous_response_id=second["id"])
    for gone in (first, second):
        kept.delete(gone["id"])
        with pytest.raises(RequestError, match=gone["id"]):
            kept.response(gone["id"])
        told = refusal(kept, input="Go", previous_response_id=gone["id"])["message"]
        assert told == f"Previous response with id '{gone['id']}' not found."
        assert refusal(kept, input=[{"id": gone["output"][0]["id"]}])
    assert messages(kept, previous_response_id=third["id"]) == [HELLO, ANSWER, MORE, ANSWER, MORE, ANSWER]
    kept.delete(third["id"])
    assert kept.num_bytes == 0


def test_a_response_that_refers_to_items_has_them_after_their_response_is_gone() -> None:
    kept = store()
    first = asked(kept, input="Hello")
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    second = asked(kept, input=[HELLO, *references, MORE])
    kept.delete(first["id"])
    assert messages(kept, previous_response_id=second["id"]) == [HELLO, ANSWER, MORE, ANSWER]


def test_a_response_is_whole_where_what_it_follows_was_deleted_while_it_was_made() -> None:
    kept = store()
    first = asked(kept, input="Hello")
    exchange = ResponseRecorder(kept)
    body = {"model": "m", "input": [MORE], "previous_response_id": first["id"]}
    request = exchange.parse(json.dumps(body).encode())
    second = request.answer(AnswerContext("m", None, [Prompt([1])])).full_response([join(SAID)])
    kept.delete(first["id"])

    async def listen() -> None:
        async def items() -> AsyncGenerator[Any, None]:
            yield 200, to_json(second)

        [_ async for _ in exchange.record(items())]

    asyncio.run(listen())
    assert messages(kept, previous_response_id=second["id"]) == [HELLO, ANSWER, MORE, ANSWER]


def test_what_a_response_follows_is_not_dropped_before_it() -> None:
    clock = Clock()
    size = len(json.dumps(asked(store(), input="Hello"))) + 2000
    kept = store(max_bytes=3 * size, clock=clock)
    first = asked(kept, input="Hello")["id"]
    second = asked(kept, input=[MORE], previous_response_id=first)["id"]
    for now in (80, 160, 240):
        clock.now = now
        kept.response(second)
        asked(kept, input="Hello")
    assert messages(kept, previous_response_id=second) == [HELLO, ANSWER, MORE, ANSWER]
    clock.now = 341
    assert refusal(kept, previous_response_id=second) and refusal(kept, previous_response_id=first)


def test_what_is_not_stored_is_refused_in_openais_words() -> None:
    kept = store()
    hidden = asked(kept, input="Hello", store=False)
    assert hidden["store"] is False
    error = refusal(kept, input="Go", previous_response_id=hidden["id"])
    assert error["message"] == f"Previous response with id '{hidden['id']}' not found."
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
    item_id = hidden["output"][0]["id"]
    error = refusal(kept, input=[{"type": "item_reference", "id": item_id}])
    assert error["message"].startswith(f"Item with id '{item_id}' not found. Items are not persisted")
    assert error["param"] == "input"
    kept_id = asked(kept, input="Hello")["id"]
    assert refusal(kept, input=[{"type": "item_reference", "id": kept_id.replace("resp_", "msg_") + "_9"}])


def test_a_service_that_stores_nothing_says_so() -> None:
    nothing = store(max_bytes=0)
    first = asked(nothing, input="Hello")
    assert first["store"] is False
    assert refusal(nothing, input="Go", previous_response_id=first["id"])


def test_what_was_not_used_for_longest_goes_first() -> None:
    size = len(json.dumps(asked(store(), input="Hello"))) + 2000
    kept = store(max_bytes=3 * size)
    first, second, third = (asked(kept, input="Hello")["id"] for _ in range(3))
    messages(kept, input="Go", previous_response_id=first)
    asked(kept, input="Hello")
    assert refusal(kept, input="Go", previous_response_id=second)
    assert messages(kept, previous_response_id=first) and messages(kept, previous_response_id=third)


def test_a_response_is_stored_for_a_time_after_its_last_use() -> None:
    clock = Clock()
    kept = store(clock=clock)
    first = asked(kept, input="Hello")["id"]
    clock.now = 90
    assert messages(kept, previous_response_id=first)
    clock.now = 180
    assert messages(kept, previous_response_id=first)
    clock.now = 281
    assert refusal(kept, input="Go", previous_response_id=first)


def test_a_response_larger_than_the_store_is_not_kept() -> None:
    kept = store(max_bytes=1500)
    assert refusal(kept, input="Go", previous_response_id=asked(kept, input="Hello")["id"])
    assert kept.is_enabled


def test_an_answer_that_failed_is_not_kept() -> None:
    kept = store()
    exchange = ResponseRecorder(kept)
    exchange.parse(b'{"model": "m", "input": "Hello"}')

    async def items() -> AsyncGenerator[Any, None]:
        yield 400, b'{"error": {}}'

    async def collect() -> list[Any]:
        return [item async for item in exchange.record(items())]

    assert asyncio.run(collect()) == [(400, b'{"error": {}}')]
