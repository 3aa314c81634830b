"""What the masks of a grammar allow has the form that was asked for, and no form that is asked for does harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.grammar import _TrialCache, compile_grammar
from qwen3_dist.worker.sampling.grammar_matcher import Grammars
from tests.walks import BUNDLED, DIRECTORIES, walker_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "nick": {"type": ["string", "null"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "object": PERSON,
    "anything": True,
    "additional": {"properties": {"a": {"type": "boolean"}}, "additionalProperties": {"type": "integer"}},
    "array": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "number"}], "items": False},
    "enum": {"enum": ['a"b', "ä\n", 3, None, {"k": [True]}]},
    "numbers": {
        "type": "array",
        "items": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 1e3},
        "minItems": 2,
    },
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0},
    "union": {"anyOf": [{"type": "string", "pattern": "^[a-c]{2,5}$"}, {"const": 1}, {"type": "null"}]},
    "date": {
        "type": "object",
        "properties": {"on": {"type": "string", "format": "date"}},
        "required": ["on"],
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"]},
        ]
    },
}
FREE = StructuredOutputs(regex=r"(?s:.*)")


def chain(links: int) -> str:
    return "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(links)) + f'a{links}: "x"'


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HARD = [f"([ab]*a[ab]{{{i}}})" for i in range(20, 40)]  # each is easy, all at once are not
REFUSED: dict[str, dict[str, Any]] = {
    "type": {"json": {"type": "strin"}},
    "no schema": {"json": "nope"},
    "a number": {"json": "3"},
    "false": {"json": False},
    "NaN": {"json": {"type": "number", "minimum": float("nan")}},
    "a huge number": {"json": {"type": "integer", "minimum": 10**400}},
    "not JSON": {"json": {"enum": [{1, 2}]}},
    "unimplemented": {"json": {"not": {"type": "string"}}},
    "remote": {"json": {"$ref": "http://example.com/schema.json"}},
    "dangling": {"json": {"$ref": "#/$defs/nowhere"}},
    "a ring of references": {
        "json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    },
    "deep": {"json": nested(100)},
    "deeper": {"json": nested(50_000)},
    "deep text": {"json": "[" * 100_000},
    "large": {"json": {"enum": [f"value {i}" for i in range(100_000)]}},
    "many optional properties": {
        "json": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}
    },
    "patterns": {"json": {"patternProperties": {f"^{i}.*{i}$": {} for i in range(2000)}}},
    "intersection": {"json": {"type": "string", "allOf": [{"pattern": pattern} for pattern in HARD]}},
    "a long chain of references": {
        "json": {
            "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(2500)} | {"d2500": {}},
            "$ref": "#/$defs/d0",
        }
    },
    "open group": {"regex": "("},
    "look-ahead": {"regex": "a(?=b)"},
    "repeats": {"regex": "a{99999999}"},
    "deep groups": {"regex": "(" * 5000 + ")" * 5000},
    "large expression": {"regex": "a" * 10_000_000},
    "a lone surrogate": {"regex": "\ud800"},
    "no choice": {"choice": ()},
    "a choice that is no text": {"choice": ("a", 1)},
    "unknown rule": {"grammar": "start: x"},
    "unknown GBNF rule": {"grammar": "root ::= x"},
    "no grammar": {"grammar": "\n" * 100_000},
    "unfinished": {"grammar": 'root ::= "\\'},
    "deep Lark": {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    "deep GBNF": {"grammar": "root ::= " + "(" * 3000},
    "a long chain of rules": {"grammar": chain(6000)},
    "intersected terminals": {
        "grammar": "start: T\nT: " + " & ".join(f"/{pattern}/" for pattern in HARD * 5)
    },
    "special token": {"grammar": "start: <|im_start|>"},
    "token by number": {"grammar": "start: <[151644]>"},
    "any token": {"grammar": "start: <[*]>"},
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_every_walk_under_the_masks_is_json_that_validates(directory: Path, name: str) -> None:
    walker, validator = walker_of(directory), Draft202012Validator(SCHEMAS[name])
    grammar = compile_grammar(StructuredOutputs(json=SCHEMAS[name]))
    for seed in range(150 if directory == BUNDLED else 15):
        text = walker.walk(grammar, seed)
        validator.validate(json.loads(text, parse_int=int_of))


def int_of(digits: str) -> int:
    return int(digits) if len(digits) < 4000 else 10**4000


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_what_validates_is_admitted_and_what_does_not_is_not(directory: Path) -> None:
    walker, grammar = walker_of(directory), compile_grammar(StructuredOutputs(json=PERSON))
    good = {"name": 'Zoë "Z" 日本 \\ 👩‍👧', "age": 41}
    for text in (
        json.dumps(good, ensure_ascii=False),
        json.dumps(good, ensure_ascii=False, indent=2),
        json.dumps(good | {"nick": None}, ensure_ascii=False, separators=(",", ":")),
    ):
        assert walker.admits(grammar, text)
    for bad in (
        good | {"age": -1},
        good | {"age": "41"},
        good | {"more": 1},
        {"name": "x"},
        good | {"name": ""},
    ):
        assert not walker.admits(grammar, json.dumps(bad, ensure_ascii=False))
    assert not walker.admits(grammar, json.dumps(good, ensure_ascii=False)[:-1])


def test_a_json_object_is_any_object_and_nothing_else() -> None:
    walker, grammar = walker_of(BUNDLED), compile_grammar(StructuredOutputs(json_object=True))
    for seed in range(100):
        assert isinstance(json.loads(walker.walk(grammar, seed)), dict)
    assert walker.admits(grammar, '{"a": [1, {"b": null}], "c": 1.5e3}')
    assert not walker.admits(grammar, "[]")


def test_blanks_come_as_printers_of_json_write_them_so_that_none_goes_on_for_ever() -> None:
    walker, grammar = walker_of(BUNDLED), compile_grammar(StructuredOutputs(json_object=True))
    assert walker.admits(grammar, '{\n    "a": [\n        1\n    ]\n}')
    assert not walker.admits(grammar, "{" + "\n" * 10 + "}")


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-[A-F]+",
        r"(yes|no)( maybe)?",
        r"(a|aa)+",
        r"(x+x+)+y",
        "[äöü]{2}|日本+",
        r"^.{0,30}$",
        'a/b"\n',
    ],
)
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_the_whole_text_matches_a_regular_expression(directory: Path, pattern: str) -> None:
    walker, grammar = walker_of(directory), compile_grammar(StructuredOutputs(regex=pattern))
    for seed in range(100 if directory == BUNDLED else 10):
        assert re.fullmatch(pattern, walker.walk(grammar, seed, wander=5))


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_choice_is_one_of_its_texts_and_may_be_any(directory: Path) -> None:
    choices = ("yes", "yes, but", "a|b", '"\\/\n\x00\x7f\u2028', "日本 👩‍👧", "(.*)", "<tool>")
    walker, grammar = walker_of(directory), compile_grammar(StructuredOutputs(choice=choices))
    assert all(walker.admits(grammar, choice) for choice in choices)
    assert {walker.walk(grammar, seed, wander=99) for seed in range(100)} <= set(choices)


@pytest.mark.parametrize(
    "source",
    [
        'start: sum\nsum: NUMBER (("+" | "-") NUMBER)*\nNUMBER: /[0-9]{1,3}/',
        'root ::= number (("+" | "-") number)*\nnumber ::= [0-9] [0-9]? [0-9]?',
    ],
    ids=["Lark", "GBNF"],
)
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_grammar_is_lark_or_gbnf(directory: Path, source: str) -> None:
    walker, grammar = walker_of(directory), compile_grammar(StructuredOutputs(grammar=source))
    for seed in range(30):
        assert re.fullmatch(r"[0-9]{1,3}([+-][0-9]{1,3})*", walker.walk(grammar, seed, wander=5))


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_no_special_token_stands_in_a_text_and_eos_only_at_its_end(directory: Path) -> None:
    walker = walker_of(directory)
    named = [walker.tokenizer.token_id(token) for token in ("<|im_start|>", "<tool_call>", "</think>")]
    padding = range(walker.tokenizer.vocab_size, walker.vocab_size)
    never = walker.tokenizer.special_token_ids | set(named) | set(padding)
    matcher = walker.grammars.matcher(compile_grammar(FREE))
    assert never & set(walker.allowed(matcher)) == set(walker.eos)
    matcher = walker.grammars.matcher(compile_grammar(StructuredOutputs(json={"type": "string"})))
    for token in walker.tokenizer.encode('"<|im_start|'):
        assert not never & set(walker.allowed(matcher))
        matcher.accept(token)
    assert not never & set(walker.allowed(matcher))
    for token in walker.tokenizer.encode('>"'):
        matcher.accept(token)
    assert set(walker.allowed(matcher)) == set(walker.eos) and matcher.is_finished


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_followed_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        compile_grammar(StructuredOutputs(**REFUSED[name]))
    assert refused.value.param == f"structured_outputs.{next(iter(REFUSED[name]))}"
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


def test_a_refusal_says_what_the_library_cannot_do() -> None:
    schema = {"properties": {"not": {"type": "string"}, "b": {"anyOf": [{"not": {}}, {"type": "null"}]}}}
    with pytest.raises(
        RequestError, match='keyword "not" cannot be enforced at properties.b.anyOf.0; leave it out$'
    ):
        compile_grammar(StructuredOutputs(json=schema))
    with pytest.raises(RequestError, match="look-around.* is not supported$"):
        compile_grammar(StructuredOutputs(regex="a(?!b)" + "c" * 1000))


def test_what_goes_wrong_on_a_rank_is_a_value_and_ends_the_text() -> None:
    walker, row = walker_of(BUNDLED), torch.zeros(128, dtype=torch.int32)
    grammar = compile_grammar(StructuredOutputs(choice=("yes",)))
    strayed = walker.grammars.matcher(grammar)
    strayed.accept(walker.tokenizer.encode("no")[0])
    unreadable = walker.grammars.matcher("start: nowhere")
    untold = Grammars(BUNDLED.parent, 4096, walker.eos).matcher(grammar)
    for matcher in (strayed, unreadable, untold):
        matcher.fill_mask(row)
        assert matcher.error and matcher.is_finished
        assert [i for i in range(4096) if row[i // 32].item() >> i % 32 & 1] == sorted(walker.eos)
        matcher.accept(1)


def test_what_was_tried_is_kept_up_to_a_number_and_a_size() -> None:
    tried = _TrialCache(most=3, most_bytes=20)
    for name in b"abcd":
        tried.put(("regex", bytes([name])), ("g", ""))
        assert tried.get(("regex", b"a"))
    assert tried.get(("regex", b"b")) is None
    tried.put(("regex", b"e" * 17), ("", "p"))
    assert tried.get(("regex", b"d")) is None and tried.get(("regex", b"e" * 17)) == ("", "p")
