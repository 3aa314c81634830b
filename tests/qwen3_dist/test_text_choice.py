"""A choice's text as it comes: what it shows of each step, and what ends it."""

from __future__ import annotations

import pytest

from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.sampling_params import SamplingParams, StructuredOutputs
from qwen3_dist.text.choice import Choice, ChoiceDelta, ParserSpec, join
from qwen3_dist.text.parsed import Parsed, ToolCallDelta
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import resolve_model

WORDS = "<think>a b c</think>the sea and the wind"


class Shouts:
    """Takes each exclamation mark for a whole tool call, and holds back full stops."""

    def __init__(self, reasoning: str, choice: int) -> None:
        self.reasoning = reasoning
        self._held = ""
        self._calls = 0

    def push(self, text: str) -> Parsed:
        calls = []
        for _ in range(text.count("!")):
            calls.append(ToolCallDelta(self._calls, f"call_{self._calls}", "shout", "{}"))
            self._calls += 1
        self._held += "." * text.count(".")
        return Parsed(text.replace("!", "").replace(".", ""), tool_calls=tuple(calls))

    def finish(self, cut: bool = False) -> Parsed:
        return Parsed(self._held)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_directory(resolve_model(""))
    assert found
    return found


def run(
    tokenizer: Tokenizer,
    text: str,
    parser_spec: ParserSpec,
    params: SamplingParams | None = None,
    end: str = "stop",
) -> list[ChoiceDelta]:
    """Deltas of a choice that generates `text`, a token a step, until it is done."""
    choice = Choice(0, params or SamplingParams(), tokenizer, parser_spec)
    token_ids = tokenizer.encode(text)
    shown = []
    for i, token_id in enumerate(token_ids):
        reason = end if i + 1 == len(token_ids) else None
        shown.append(choice.advance(TokenDelta(0, (token_id,), finish_reason=reason)))
        if choice.done:
            break
    return shown


@pytest.mark.parametrize("text", ["<think>a</think>b", "a"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("has_form", [False, True])
@pytest.mark.parametrize("reasoning", ["none", "optional", "open"])
def test_a_form_that_begins_with_the_text_of_a_mark_has_not_thought(
    tokenizer: Tokenizer, text: str, as_text: bool, has_form: bool, reasoning: str
) -> None:
    made: list[Shouts] = []

    def new_parser(reasoning: str, choice: int) -> Shouts:
        made.append(Shouts(reasoning, choice))
        return made[-1]

    form = StructuredOutputs(regex=".*") if has_form else None
    params = SamplingParams(reasoning=reasoning, structured_outputs=form)
    token_ids = [id for char in text for id in tokenizer.encode(char)] if as_text else tokenizer.encode(text)
    Choice(0, params, tokenizer, ParserSpec(reasoning, new_parser=new_parser)).advance(
        TokenDelta(0, tuple(token_ids))
    )
    thinks = text.startswith("<think>") and not as_text
    expected = "none" if reasoning == "optional" and has_form and not thinks else reasoning
    assert [parser.reasoning for parser in made] == [expected]


def test_what_a_parser_holds_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    *_, before, last = run(tokenizer, "a.b.c", ParserSpec(new_parser=Shouts))
    assert (before.text + last.text)[-2:] == ".."
    assert last.finish_reason == "stop"


@pytest.mark.parametrize(
    ("parser_spec", "end", "reason"),
    [
        (ParserSpec(new_parser=Shouts), "stop", "tool_calls"),
        (ParserSpec(new_parser=Shouts), "length", "length"),
        (ParserSpec(new_parser=Shouts, reports_tool_calls=False), "stop", "stop"),
    ],
)
def test_a_choice_that_ends_with_calls_says_so(
    tokenizer: Tokenizer, parser_spec: ParserSpec, end: str, reason: str
) -> None:
    assert run(tokenizer, "now! go", parser_spec, end=end)[-1].finish_reason == reason


def test_of_more_calls_than_wanted_the_choice_ends_with_the_last_wanted(tokenizer: Tokenizer) -> None:
    deltas = run(tokenizer, "one! two! three!", ParserSpec(new_parser=Shouts, max_tool_calls=1))
    whole = join(deltas)
    assert [call.id for call in whole.tool_calls] == ["call_0"]
    assert whole.finish_reason == "tool_calls"
    assert len(whole.token_ids) < len(tokenizer.encode("one! two! three!"))


@pytest.mark.parametrize(
    ("reasoning", "text", "thought"),
    [
        ("none", WORDS, ""),
        ("optional", WORDS, "a b c"),
        ("optional", f"\n{WORDS}", "a b c"),
        ("optional", "the sea", ""),
        ("optional", f"the sea {WORDS}", ""),
        ("open", "a b c</think>the sea <think> again </think>", "a b c"),
        ("open", "a b c", "a b c"),
    ],
)
def test_tokens_between_the_marks_count_as_thought(
    tokenizer: Tokenizer, reasoning: str, text: str, thought: str
) -> None:
    params = SamplingParams(reasoning=reasoning)
    counted = join(run(tokenizer, text, ParserSpec(reasoning), params)).num_reasoning_tokens
    assert counted == len(tokenizer.encode(thought))


def test_stop_strings_apply_before_the_text_is_read(tokenizer: Tokenizer) -> None:
    whole = join(run(tokenizer, "one! two!", ParserSpec(new_parser=Shouts), SamplingParams(stop=("tw",))))
    assert (whole.text, len(whole.tool_calls)) == ("one ", 1)
    assert (whole.finish_reason, whole.stop_reason) == ("tool_calls", "tw")
