"""Texts such as <tool_call> and <|im_end|> in forms: they come by ordinary tokens, whole, and end nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.grammar_tokenizer import grammar_tokenizer
from qwen3_dist.structured.tool_grammar import tool_call_grammar
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.worker.sampling.grammar_matcher import Grammars
from tests.walks import BUNDLED, DIRECTORIES, Walker, walker_of

MARKS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
DECOMPOSED = "e\u0301 \u212b \u1100\u1161"  # NFC would compose it


def property_named(name: str) -> dict[str, Any]:
    fields = {name: {"type": "boolean"}}
    return {"type": "object", "properties": fields, "required": [name], "additionalProperties": False}


def ids_of(walker: Walker, grammar: str, seed: int = 0) -> list[int]:
    """Tokens of a text of `grammar`, without EOS."""
    tokens = walker.walk_ids(grammar, seed)
    assert not walker.tokenizer.special_token_ids & set(tokens)
    return tokens


@pytest.mark.parametrize("mark", [*MARKS, DECOMPOSED])
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_mark_is_written_as_text(directory: Path, mark: str) -> None:
    walker = walker_of(directory)
    forms: list[tuple[dict[str, Any], str]] = [
        ({"choice": (mark,)}, mark),
        ({"choice": (f"{mark}x",)}, f"{mark}x"),
        ({"regex": f"Say {''.join(f'[{c}]' if c in '|' else c for c in mark)} now"}, f"Say {mark} now"),
        ({"grammar": f"start: {json.dumps(mark)} /x/"}, f"{mark}x"),
        ({"json": {"const": mark}}, json.dumps(mark, ensure_ascii=False)),
        ({"json": {"enum": [mark]}}, json.dumps(mark, ensure_ascii=False)),
    ]
    for form, text in forms:
        tokens = ids_of(walker, compile_grammar(StructuredOutputs(**form)))
        assert walker.tokenizer.decode(tokens) == text
        assert not {walker.tokenizer.token_id(other) for other in MARKS} & set(tokens)
    grammar = compile_grammar(StructuredOutputs(json=property_named(mark)))
    assert list(json.loads(walker.tokenizer.decode(ids_of(walker, grammar)))) == [mark]


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_every_added_token_can_be_written_as_text(directory: Path) -> None:
    walker = walker_of(directory)
    added = json.loads((directory / "tokenizer.json").read_bytes())["added_tokens"]
    text = " ".join(token["content"] for token in added)
    grammar = compile_grammar(StructuredOutputs(choice=(text,)))
    assert walker.tokenizer.decode(ids_of(walker, grammar)) == text


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("form", ["json", "xml"])
def test_arguments_of_calls_may_be_marks_and_the_call_ends_behind_them(form: str, mark: str) -> None:
    walker = walker_of(BUNDLED)
    schema = {**property_named("a"), "properties": {"a": {"enum": [mark]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    tokens = walker.walk_ids(compile_grammar(tool_call_grammar([tool], "f", form=form)), 0)
    opens, closes = (walker.tokenizer.token_id(token) for token in ("<tool_call>", "</tool_call>"))
    assert (tokens[0], tokens[-1]) == (opens, closes) and not {opens, closes} & set(tokens[1:-1])
    said = walker.tokenizer.decode(tokens)
    expected = (
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": {json.dumps(mark)}}}}}\n</tool_call>'
        if form == "json"
        else f"<tool_call>\n<function=f>\n<parameter=a>\n{mark}\n</parameter>\n</function>\n</tool_call>"
    )
    assert said == expected


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_text_without_marks_is_split_as_the_checkpoint_splits_it(directory: Path) -> None:
    ours = tokenizers.Tokenizer.from_str(grammar_tokenizer((directory / "tokenizer.json").read_text()))
    theirs = Tokenizer.from_directory(directory)
    assert theirs is not None
    text = 'It is {"colour": "r\u00e9d"},\n\n\t42 < 43 | x </a> \u65e5\u672c \U0001f469\u200d\U0001f467'
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_a_grammar_that_names_a_token_which_the_checkpoint_lacks_is_told_before_it_is_used(
    tmp_path: Path,
) -> None:
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<tool_call>", "<other>"))
    grammars = Grammars(tmp_path, 4224, [4072])
    grammars.build("start: <tool_call>").exception()
    grammars.build('start: "a"').exception()
    assert "tool_call" in (grammars.problem("start: <tool_call>") or "")
    assert grammars.problem('start: "a"') == ""
