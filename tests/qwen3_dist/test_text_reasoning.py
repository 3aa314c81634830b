"""What a model thinks is told from what it says, as its chat template has them, however the text comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.parsed import Parsed
from qwen3_dist.text.reasoning import Reasoning, reasoning_state
from tests.splits import however_cut, parsed, pieces_of

REPO = Path(__file__).resolve().parents[2]
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"
STATES = ("none", "optional", "open")


@pytest.mark.parametrize(
    ("state", "text", "reasoning", "content"),
    [
        ("optional", "<think>\nwhy\n</think>\n\nso", "why", "so"),
        ("optional", " \n<think>why</think>so", "why", "so"),
        ("optional", "<think>\n\n</think>\n\nso", "", "so"),
        ("optional", "<think>\na\n\nb </thinking> c\n", "a\n\nb </thinking> c", ""),
        ("optional", "so it <think>is</think>", "", "so it <think>is</think>"),
        ("optional", "\n <thin", "", "\n <thin"),
        ("optional", "a</think>b", "", "a</think>b"),
        ("open", "why\n</think>\n\nso</think>\n\n<think>", "why", "so</think>\n\n<think>"),
        ("open", "\nwhy, cut off\n", "why, cut off", ""),
        ("open", "why</thin", "why</thin", ""),
        ("open", "</think>\n\n so \n", "", " so \n"),
        ("open", "<think>\nwhy\n</think>\n\nso", "why", "so"),
        ("open", "\n<think>\n<think>why", "why", ""),
        ("open", "\n<thi", "<thi", ""),
        ("open", "why <think> so", "why <think> so", ""),
        ("none", "\n<think>\nwhy\n</think>\n\nso\n", "", "\n<think>\nwhy\n</think>\n\nso\n"),
    ],
)
def test_thoughts_are_told_from_content(state: str, text: str, reasoning: str, content: str) -> None:
    assert however_cut(lambda: Reasoning(state), text) == Parsed(content, reasoning)


def test_thoughts_are_shown_as_they_come() -> None:
    reasoning = Reasoning("optional")
    pieces = ["<think>", "\n", "wh", "y", " </", "p>", "\n", "</think>", "\n\n", "so", "\n"]
    shown = [reasoning.push(piece) for piece in pieces]
    assert [s.reasoning for s in shown] == ["", "", "wh", "y", " ", "</p>", "", "", "", "", ""]
    assert [s.content for s in shown][-3:] == ["", "so", "\n"]


@settings(max_examples=300, deadline=None)
@given(
    state=st.sampled_from(STATES),
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "\n", " ", "<", "</", "think>", "é"]) | st.text(max_size=3)
    ).map("".join),
    sizes=st.lists(st.integers(1, 5), max_size=6),
)
def test_any_text_comes_out_however_it_is_split(state: str, text: str, sizes: list[int]) -> None:
    whole = parsed(Reasoning(state), [text])
    assert parsed(Reasoning(state), pieces_of(text, sizes)) == whole
    if state == "none" or (state == "optional" and not text.lstrip().startswith("<think>")):
        assert whole == Parsed(text)
    elif state == "open" and "</think>" not in text and not text.lstrip("\n").startswith("<think>"):
        assert whole == Parsed(reasoning=text.strip("\n"))


# As the 2507 models' templates end.
THINKING_2507 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if '</think>' in messages[0].content %}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
INSTRUCT_2507 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CODER = INSTRUCT_2507 + "{% if tools %}<tool_call>\n<function=f>\n</function>\n</tool_call>{% endif %}"


def templates() -> list[Any]:
    hybrid = [pytest.param(ChatTemplate.from_directory(REPO / "qwen3_dist" / "bundled"), id="bundled")]
    real = pytest.param(
        ChatTemplate.from_directory(REAL) if REAL.exists() else None,
        id="real",
        marks=pytest.mark.skipif(not REAL.exists(), reason="the real Qwen3 template is not at hand"),
    )
    return [*hybrid, real]


def state_of(template: ChatTemplate, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return reasoning_state(template.render(messages, **kwargs), template.source(), kwargs)


ASKED = [{"role": "user", "content": "<think> or not?"}]


@pytest.mark.parametrize("template", templates())
def test_a_hybrid_model_may_think_unless_that_is_off(template: ChatTemplate) -> None:
    assert state_of(template, ASKED) == "optional"
    assert state_of(template, ASKED, enable_thinking=True) == "optional"
    assert state_of(template, ASKED, enable_thinking=False) == "none"
    assert state_of(template, ASKED, add_generation_prompt=False) == "optional"


@pytest.mark.parametrize("template", templates())
def test_a_continued_message_goes_on_where_it_stands(template: ChatTemplate) -> None:
    def continued(**message: Any) -> str:
        messages = [*ASKED, {"role": "assistant", **message}]
        return state_of(template, messages, add_generation_prompt=False, continue_final_message=True)

    assert continued(content="It is") == "none"
    assert continued(content="It is", reasoning_content="why") == "none"


@pytest.mark.parametrize(
    ("source", "state"), [(THINKING_2507, "open"), (INSTRUCT_2507, "none"), (CODER, "none")]
)
def test_other_models_always_or_never_think(source: str, state: str) -> None:
    template = ChatTemplate({"default": source}, {})
    assert state_of(template, ASKED) == state
    assert state_of(template, ASKED, enable_thinking=True) == state


def test_a_begun_thought_is_continued() -> None:
    template = ChatTemplate({"default": INSTRUCT_2507}, {})
    messages = [*ASKED, {"role": "assistant", "content": "<think>\nLet me"}]
    assert state_of(template, messages, add_generation_prompt=False, continue_final_message=True) == "open"
