"""An answer that goes on at another replica is, byte for byte, the answer of one replica."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.responses import answer as response_answer
from serve_app.apis.shared.answer import Counted
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.resume import Resume
from serve_app.replica.deployment import EngineReplica
from tests.serve_app.resuming import Client, answered, asked, by_choice, replica_of

TOKENIZER = Tokenizer.from_directory(bundled_path())
assert TOKENIZER is not None
STORY = (
    "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": list(PROPERTIES),
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather of a city.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
CUSTOM = {"type": "custom", "custom": {"name": "shell", "description": "Runs a command."}}
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
FORM = {"type": "json_schema", "json_schema": {"name": "S", "schema": SCHEMA}}
SAID = "go STOPPER on \u2014 \U0001f98a\U0001f43c STOPPING \u00e9nd"
ONE = {"structured_outputs": {"choice": [SAID]}, "enable_thinking": False, "return_token_ids": True}
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 5}}\n</tool_call>'
)
CALLED = {"messages": WEATHER, "tools": TOOLS, "enable_thinking": False, "max_tokens": 160}
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 40}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("chat", {"stream_options": {"include_usage": True}}),
    "seeded": ("chat", {**DRAWN, "seed": 7}),
    "unseeded": ("chat", DRAWN),
    "penalties": (
        "chat",
        {**DRAWN, "presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_p": 0.02},
    ),
    "bias": ("chat", {"logit_bias": {"30": 3}, "bad_words": ["fox", "the old"], "seed": 3, **DRAWN}),
    "stop strings": ("chat", {**ONE, "stop": ["STOPPING"]}),
    "stop string shown": ("chat", {**ONE, "stop": ["PING", "STOPPING"], "include_stop_str_in_output": True}),
    "stop token": ("chat", {**ONE, "stop_token_ids": [TOKENIZER.encode(SAID)[-2]]}),
    "characters": ("chat", ONE),
    "min_tokens": ("chat", {"min_tokens": 20, "stop": [" a", "e", "."], "return_token_ids": True}),
    "json_schema": ("chat", {"response_format": FORM, "messages": WEATHER, "max_tokens": 80, **DRAWN}),
    "budget": ("chat", {"thinking_token_budget": 9, "response_format": FORM, "max_tokens": 90}),
    "tools": ("chat", {**CALLED, "enable_thinking": True, "return_token_ids": True}),
    "calls": ("chat", {**CALLED, "structured_outputs": {"choice": [CALLS]}, "return_token_ids": True}),
    "one call": ("chat", {**CALLED, "tool_choice": "required", "parallel_tool_calls": False}),
    "custom tool": ("chat", {**CALLED, "tools": [CUSTOM], "tool_choice": "required"}),
    "log-probabilities": ("chat", {"logprobs": True, "top_logprobs": 2, **DRAWN}),
    "scored text": ("completions", {"prompt": STORY, "logprobs": 2, **DRAWN}),
    "completion": ("completions", {"stream_options": {"include_usage": True}, "echo": True}),
    "responses": ("responses", {}),
    "response with a call": (
        "responses",
        {"input": WEATHER, "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 160},
    ),
    "response with a custom call": (
        "responses",
        {"tools": [{"type": "custom", "name": "shell"}], "tool_choice": "required"},
    ),
    "scored response": (
        "responses",
        {"top_logprobs": 2, "reasoning": {"effort": "none"}, "temperature": 1, "top_p": 0.95},
    ),
    "messages": ("messages", {"thinking": {"type": "adaptive"}, "temperature": 1}),
    "message with a call": (
        "messages",
        {
            "messages": WEATHER,
            "max_tokens": 160,
            "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
        },
    ),
    "message that stops": ("messages", {"stop_sequences": [" the", "fox"], "temperature": 0}),
}
# Choices of these may take turns in another order.
SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "choices": ("chat", {"n": 2, **DRAWN, "return_token_ids": True}),
    "one ends early": (
        "completions",
        {"prompt": STORY, "n": 3, "stop": ["er", "."], "seed": 5, "max_tokens": 40, **DRAWN},
    ),
    "choices that call": ("chat", {**CALLED, "n": 2, "tool_choice": "required", **DRAWN}),
    "prompts": (
        "completions",
        {
            "prompt": ["the sea", STORY, [7, 8, 9], "the sea"],
            "n": 2,
            "echo": True,
            "logprobs": None,
            "stop": ["an"],
            "stream_options": {"include_usage": True},
            **DRAWN,
        },
    ),
}


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completed responses tell when they were completed."""
    monkeypatch.setattr(response_answer, "time", SimpleNamespace(time=lambda: 1.7e9))


def started(**settings: Any) -> AsyncEngine:
    config = {"device": "cpu", "dtype": "float32", "num_blocks": 512, "prefix_caching": False, **settings}
    return AsyncEngine(EngineConfig(**config))


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[EngineReplica]]:
    """Two replicas, the second of which reads prompts in small chunks."""
    engines = [started(), started(max_num_batched_tokens=16)]
    yield [replica_of(engine) for engine in engines]
    for engine in engines:
        engine.shutdown()


def some_cuts(num_parts: int, name: str) -> list[int]:
    """After none of `num_parts`, the first, all but the last, and some in between, other ones for each case."""
    inner, most = range(2, num_parts - 1), 15 if name in ("stop strings", "characters", "calls") else 4
    return sorted({0, 1, num_parts - 1, *random.Random(name).sample(inner, min(most, len(inner)))})


def in_parts(request: GenerationRequest, replica: EngineReplica) -> Client:
    """The whole stream in more than three parts; on a busy machine several steps may come as one."""
    for _ in range(20):
        if len((whole := Client(request).read(replica)).parts) > 3:
            return whole
    raise AssertionError("no stream had more than three parts")


def scored(data: bytes) -> tuple[bytes, list[float]]:
    """The stream without its log-probabilities, and these: tokens that were sent are read in other chunks than they
    were generated in, which may change the last bits of what follows."""
    found = re.findall(rb"-[0-9]+\.[0-9]+(?:e-[0-9]+)?", data)
    return re.sub(rb"-[0-9]+\.[0-9]+(?:e-[0-9]+)?", b"#", data), [float(number) for number in found]


@pytest.mark.parametrize("name", CASES)
def test_a_stream_that_goes_on_elsewhere_is_the_same(name: str, replicas: list[EngineReplica]) -> None:
    api, fields = CASES[name]
    whole = in_parts(asked(api, **fields), replicas[0])
    expected, scores = scored(whole.data)
    assert b"event: error" not in whole.data
    for cut in some_cuts(len(whole.parts), name):
        once = whole.up_to(cut).read(replicas[1])
        twice = once.up_to((cut + len(once.parts)) // 2).read(replicas[0])
        for again in (once, twice):
            assert scored(again.data) == (expected, pytest.approx(scores, abs=1e-4)), cut
            assert again.parts[-1].tokens == whole.parts[-1].tokens


@pytest.mark.parametrize("name", SEVERAL)
def test_each_choice_of_a_stream_that_goes_on_elsewhere_is_the_same(
    name: str, replicas: list[EngineReplica]
) -> None:
    api, fields = SEVERAL[name]
    whole = Client(asked(api, **fields)).read(replicas[0])
    expected = by_choice(whole.data)
    assert len({b"".join(events) for events in expected.values()}) == len(expected)
    for cut in some_cuts(len(whole.parts), name):
        once = whole.up_to(cut).read(replicas[1])
        twice = once.up_to((cut + len(once.parts)) // 2).read(replicas[0])
        for again in (once, twice):
            assert by_choice(again.data) == expected, cut
            assert again.parts[-1].tokens == whole.parts[-1].tokens


# Answers in one piece alone have these.
SCORED: dict[str, tuple[str, dict[str, Any]]] = {
    "scored prompt": ("completions", {"prompt": STORY, "prompt_logprobs": 1, "n": 2, "logprobs": 1, **DRAWN}),
    "scored echo": ("completions", {"prompt": [STORY, "the sea"], "logprobs": 2, "echo": True, **DRAWN}),
}


def in_one_piece(
    request: GenerationRequest, replica: EngineReplica, resume: Resume | None = None
) -> tuple[list[Counted], Counted]:
    """The parts that tell how far the answer got, and the one with its body."""
    *parts, last = answered(replica, request, resume)
    assert all(part.item == b"" for part in parts) and last.item[0] == 200, last
    return parts, last


def progress(parts: list[Counted]) -> Resume:
    """What the ingress remembers of these parts."""
    resume = Resume(parts[0].model)
    for part in parts:
        resume.add(part.sent)
    return resume


@pytest.mark.parametrize("name", [*CASES, *SEVERAL, *SCORED])
def test_an_answer_in_one_piece_goes_on_elsewhere(name: str, replicas: list[EngineReplica]) -> None:
    api, fields = {**CASES, **SEVERAL, **SCORED}[name]
    request = asked(api, **{**fields, "stream_options": None, "stream": False})
    parts, whole = in_one_piece(request, replicas[0])
    expected, scores = scored(whole.item[1])
    assert len(parts) > 3 and whole.tokens == parts[-1].tokens
    for cut in (1, len(parts) // 2, len(parts) - 1):
        resume = progress(parts[:cut])
        more, again = in_one_piece(request, replicas[1], resume)
        assert scored(again.item[1]) == (expected, pytest.approx(scores, abs=1e-4)), cut
        assert again.tokens == whole.tokens
        for part in more[:1]:
            resume.add(part.sent)
            assert part.tokens > parts[cut - 1].tokens
        _, twice = in_one_piece(request, replicas[0], resume)
        assert scored(twice.item[1]) == (expected, pytest.approx(scores, abs=1e-4)), cut
