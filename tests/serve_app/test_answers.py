"""Answer forms: choice deltas in, the API's JSON out. No engine and no HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta, join
from qwen3_dist.text.parsed import ToolCallDelta
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import resolve_model
from serve_app.apis.chat.answer import ChatAnswer
from serve_app.apis.completions import CompletionAnswer
from serve_app.apis.shared.answer import DONE, AnswerContext
from serve_app.apis.shared.openai import AnswerOptions
from serve_app.apis.shared.prompts import Prompt


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_directory(resolve_model(""))
    assert found
    return found


def context_of(tokenizer: Tokenizer, text: str = "the sea", n: int = 1) -> AnswerContext:
    return AnswerContext("m", tokenizer, [Prompt(tokenizer.encode(text), text)], n)


def delta(text: str = "", finish_reason: str | None = None, **fields: Any) -> ChoiceDelta:
    return ChoiceDelta(
        **{"index": 0, "token_ids": (5,), "logprobs": (), **fields}, text=text, finish_reason=finish_reason
    )


def chunks(*items: bytes) -> list[dict[str, Any]]:
    return [
        json.loads(event) for event in b"".join(items).decode().split("data: ")[1:] if "[DONE]" not in event
    ]


CALL = [
    ToolCallDelta(0, "call_1", "tide", ""),
    ToolCallDelta(0, arguments='{"port": '),
    ToolCallDelta(0, arguments='"Brest"}'),
    ToolCallDelta(1, "call_2", "wind", "{}"),
]


def test_the_role_comes_first_and_alone(tokenizer: Tokenizer) -> None:
    answer = ChatAnswer(context_of(tokenizer), AnswerOptions())
    first, second, third = chunks(answer.delta(delta("a")), answer.delta(delta("b")))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["delta"] for c in (second, third)] == [{"content": "a"}, {"content": "b"}]
    assert answer.delta(delta("")) == b""
    assert answer.end() == DONE


@pytest.mark.parametrize("answer_of", [ChatAnswer, CompletionAnswer])
@pytest.mark.parametrize(
    "options",
    [
        AnswerOptions(),
        AnswerOptions(include_usage=True),
        AnswerOptions(include_usage=True, continuous_usage_stats=True),
        AnswerOptions(token_ids=True),
        AnswerOptions(reasoning=False),
        AnswerOptions(echo=True),
    ],
)
def test_a_chunk_of_text_alone_is_made_as_all_others_are(
    tokenizer: Tokenizer, answer_of: type[ChatAnswer | CompletionAnswer], options: AnswerOptions
) -> None:
    said = [
        *[delta(text) for text in ("a", 'b"\n\0', "海\u2028", "\0", "")],
        *[delta(reasoning=text) for text in ("Hm", "\0", "")],
        delta("both", reasoning="at once"),
        delta("scored", logprobs=(TokenLogprob(5, -1.0),)),
        delta(tool_calls=(ToolCallDelta(0, "call_1", "tide", "{}"),)),
        delta("other", index=1),
        delta("other", index=1),
        delta("end", "stop"),
    ]
    context = context_of(tokenizer, n=2)
    quick, plain = answer_of(context, options), answer_of(context, options)
    for each in said:
        quick.count(each)
        plain.count(each)
        assert quick.delta(each) == plain._chunks(each), each


def test_streamed_calls_join_to_the_whole_ones(tokenizer: Tokenizer) -> None:
    deltas = [delta(tool_calls=(part,)) for part in CALL] + [delta(finish_reason="tool_calls")]
    answer = ChatAnswer(context_of(tokenizer), AnswerOptions())
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks(*(answer.delta(d) for d in deltas)):
        for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
            index, function = part.pop("index"), part.pop("function")
            call = calls.setdefault(index, {"function": {"arguments": ""}})
            call |= part
            call["function"]["arguments"] += function.pop("arguments")
            call["function"] |= function
    [choice] = answer.full_response([join(deltas)])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == list(calls.values())
    assert calls[0]["function"] == {"name": "tide", "arguments": '{"port": "Brest"}'}


def test_reasoning_has_both_its_names_and_can_be_left_out(tokenizer: Tokenizer) -> None:
    deltas = [delta(reasoning="hm", num_reasoning_tokens=1), delta("yes", finish_reason="stop")]
    for wanted in (True, False):
        answer = ChatAnswer(context_of(tokenizer), AnswerOptions(reasoning=wanted))
        for d in deltas:
            answer.count(d)
        message = answer.full_response([join(deltas)])["choices"][0]["message"]
        thought = {"reasoning": "hm", "reasoning_content": "hm"} if wanted else {}
        assert message == {"role": "assistant", "content": "yes", **thought}
        assert answer.usage.to_json()["completion_tokens_details"] == {"reasoning_tokens": 1}


def test_an_answer_that_is_all_thought_has_no_content(tokenizer: Tokenizer) -> None:
    answer = ChatAnswer(context_of(tokenizer), AnswerOptions())
    whole = answer.full_response([delta(reasoning="hm", finish_reason="length")])
    assert whole["choices"][0]["message"]["content"] is None


def test_a_message_that_is_gone_on_with_can_come_ahead(tokenizer: Tokenizer) -> None:
    answer = ChatAnswer(context_of(tokenizer), AnswerOptions(), echoed="The sea")
    content = [chunk["choices"][0]["delta"]["content"] for chunk in chunks(answer.delta(delta(" is")))]
    assert content == ["The sea", " is"]
    assert answer.full_response([delta(" is", "stop")])["choices"][0]["message"]["content"] == "The sea is"


def test_log_probabilities_come_while_their_text_is_held_back(tokenizer: Tokenizer) -> None:
    answer = ChatAnswer(context_of(tokenizer), AnswerOptions(logprobs=True))
    _, chunk = chunks(answer.delta(delta(logprobs=(TokenLogprob(5, float("-inf")),))))
    [token] = chunk["choices"][0]["logprobs"]["content"]
    assert token["logprob"] == -9999.0


def test_text_offsets_count_characters_that_several_tokens_make(tokenizer: Tokenizer) -> None:
    text = "a🌊b"
    token_ids = tokenizer.encode(text)
    scores = tuple(TokenLogprob(token_id, -1.0) for token_id in token_ids)
    answer = CompletionAnswer(context_of(tokenizer), AnswerOptions(logprobs=True))
    [choice] = answer.full_response([delta(text, "stop", logprobs=scores, token_ids=tuple(token_ids))])[
        "choices"
    ]
    assert choice["logprobs"]["text_offset"][0] == 0
    assert choice["logprobs"]["text_offset"][-1] == 2


def test_an_echoed_prompt_has_log_probabilities_but_its_first_token(tokenizer: Tokenizer) -> None:
    prompt = context_of(tokenizer, n=2)
    token_ids = prompt.prompts[0].token_ids
    scores = (None, *(TokenLogprob(token_id, -2.0, ((token_id, -2.0),)) for token_id in token_ids[1:]))
    one = delta("!", "length", logprobs=(TokenLogprob(5, -1.0),), prompt_logprobs=scores)
    other = delta("?", "length", logprobs=(TokenLogprob(6, -1.0),), index=1)
    answer = CompletionAnswer(prompt, AnswerOptions(echo=True, logprobs=True))
    for choice, text in zip(answer.full_response([one, other])["choices"], "!?", strict=True):
        columns = choice["logprobs"]
        assert choice["text"] == f"the sea{text}"
        assert columns["token_logprobs"] == [None, *([-2.0] * (len(token_ids) - 1)), -1.0]
        assert columns["top_logprobs"][0] is None
        assert "".join(columns["tokens"][:-1]) == "the sea"
        assert columns["text_offset"][-1] == len("the sea")
        assert "prompt_logprobs" not in choice


def test_prompt_log_probabilities_come_by_token_id(tokenizer: Tokenizer) -> None:
    scores = (None, TokenLogprob(7, -2.0, ((8, -0.5),), rank=5))
    one = delta("!", "length", prompt_logprobs=scores)
    for answer in (
        CompletionAnswer(context_of(tokenizer), AnswerOptions(prompt_logprobs=True)).full_response([one])[
            "choices"
        ][0],
        ChatAnswer(context_of(tokenizer), AnswerOptions(prompt_logprobs=True)).full_response([one]),
    ):
        first, second = answer["prompt_logprobs"]
        assert first is None
        shown = {token_id: (p["logprob"], p["rank"]) for token_id, p in second.items()}
        assert shown == {"7": (-2.0, 5), "8": (-0.5, 1)}
