"""Kinds of JSON value: what is accepted, how a refusal reads, and that the JSON schema says the same."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.kinds import (
    BOOL,
    FILLED_TEXT,
    OBJECT,
    TEXT,
    Either,
    Field,
    Kind,
    ListOf,
    Record,
    Tagged,
    integer,
    number,
    number_above,
    one_of,
)

TOKEN_IDS = ListOf(integer(0), "a list of token ids", least=1, most=3)
POINT = Record("a point", {"x": Field(integer(), "across", required=True), "y": Field(integer(), "up")})
SHAPE = Tagged(
    "a shape",
    "type",
    {"dot": POINT, "text": Record("a text", {"text": Field(TEXT, required=True)})},
    {"image": "is not supported: send text"},
)
ITEM = Tagged("an item", "type", {"dot": POINT, "text": SHAPE.records["text"]}, {}, untagged="dot")
ITEM_OR_TEXT = Tagged("an item", "type", ITEM.records, {}, untagged="dot", bare="text")
KINDS: dict[str, Kind] = {
    "text": TEXT,
    "filled text": FILLED_TEXT,
    "bool": BOOL,
    "object": OBJECT,
    "integer": integer(),
    "count": integer(1),
    "share": integer(0, 3),
    "number": number(-2, 2),
    "top_p": number_above(0, 1),
    "word": one_of("auto", "none"),
    "token ids": TOKEN_IDS,
    "point": POINT,
    "points": ListOf(POINT, "points"),
    "shape": SHAPE,
    "item": ITEM,
    "item or text": ITEM_OR_TEXT,
    "text or ids": Either("text or token ids", (TEXT, TOKEN_IDS)),
    "lists of either": Either("one list or another", (TOKEN_IDS, ListOf(TEXT, "texts", least=1))),
    "optional word": Record("", {"word": Field(one_of("a", "b")), "either": Field(Either("", (TEXT, BOOL)))}),
    "optional shape": Record("", {"shape": Field(SHAPE), "count": Field(integer(1, 2))}),
}
VALUES: list[Any] = [
    "", "auto", "b", True, False, 0, 1, 3, -2, 4, 0.5, -0.1, 2.5, 10**30, 1e9 + 0.5, [], [1], [0, 1, 2], [1, 2, 3, 4],
    [-1], ["a"], ["a", 1], [1.5], [True], [{}], [{"x": 1}], [{"x": 1}, {"y": 1}], {}, {"x": 1}, {"x": 1, "y": None},
    {"x": "1"}, {"x": 1, "z": []}, {"type": "dot", "x": 1}, {"type": "dot"}, {"type": "text", "text": "a"},
    {"type": "image"}, {"type": 5}, {"type": None}, {"type": None, "x": 1}, {"type": []}, {"text": "a"},
    {"text": "a", "x": None, "type": None}, {"text": "a", "x": 1}, {"text": "a", "x": "1"}, {"text": 1},
    {"text": None}, {"word": "a"}, {"word": "c"}, {"word": None},
    {"either": None}, {"either": 1}, {"either": True}, {"shape": None, "count": None}, {"shape": {"type": "dot"}},
    {"shape": {"type": "dot", "x": 2}, "count": 3}, {"count": True},
]  # fmt: skip


def refusal(kind: Kind, value: Any, where: str = "it") -> RequestError:
    with pytest.raises(RequestError) as error:
        kind.read(value, where)
    return error.value


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_kind_accepts_exactly_what_its_schema_does(kind: Kind) -> None:
    validator = jsonschema.Draft202012Validator(kind.schema)
    validator.check_schema(kind.schema)
    for value in VALUES:
        assert kind.accepts(value) == validator.is_valid(value), value


@pytest.mark.parametrize(
    ("kind", "value", "param", "message"),
    [
        (BOOL, 1, "it", "it must be true or false, not 1"),
        (integer(0, 3), 4, "it", "it must be an integer from 0 to 3, not 4"),
        (number_above(0, 1), 0, "it", "it must be a number above 0 and at most 1, not 0"),
        (TOKEN_IDS, [], "it", "it must be a list of token ids, not []"),
        (TOKEN_IDS, [1, "a"], "it[1]", 'it[1] must be an integer of at least 0, not "a"'),
        (ListOf(POINT, "points"), [{"x": 1}, {"x": True}], "it[1].x", "it[1].x must be an integer, not true"),
        (POINT, {}, "it.x", "it.x is required: an integer"),
        (SHAPE, {"type": "dot"}, "it.x", "it.x is required: an integer"),
        (SHAPE, {"type": "blob"}, "it.type", 'it.type must be one of dot, text, not "blob"'),
        (SHAPE, {"type": "image"}, "it.type", 'it.type="image" is not supported: send text'),
        (KINDS["text or ids"], [0.5], "it[0]", "it[0] must be an integer of at least 0, not 0.5"),
        (KINDS["text or ids"], 5, "it", "it must be text or token ids, not 5"),
        (KINDS["lists of either"], [1, "a"], "it", 'it must be one list or another, not [1, "a"]'),
    ],
)
def test_a_refusal_names_the_innermost_value(kind: Kind, value: Any, param: str, message: str) -> None:
    error = refusal(kind, value)
    assert (error.param, str(error)) == (param, message)


def test_nulls_are_left_out_and_unknown_fields_kept() -> None:
    assert POINT.read({"x": 1, "y": None, "z": {"deep": None}}, "") == {"x": 1, "z": {"deep": None}}


def test_a_long_value_is_shown_in_part() -> None:
    assert len(str(refusal(BOOL, "x" * 10_000))) < 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b'{"x": NaN}', b'{"x": Infinity}', b'{"x": "\\ud800"}', b'{"x": "\xff"}',
     b"[" * 10_000],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="request body"):
        POINT.read_body(body)
