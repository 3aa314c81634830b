"""What bodies are made of: what is accepted, how a refusal reads, and that the JSON schema says the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

import jsonschema
import pytest
from pydantic import create_model
from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.body import (
    Body,
    ByTag,
    ByType,
    Filled,
    Json,
    Must,
    Range,
    about,
    read_body,
    validate,
)
from serve_app.apis.shared.schema import schema_of

Integer = Annotated[int, Must("an integer")]
TokenIds = Annotated[list[Annotated[int, Range(0)]], Must("a list of token ids", 1, 3)]


class Point(TypedDict, total=False):
    x: Required[Annotated[Integer, about("across")]]
    y: Annotated[Integer, about("up")]


class Dot(TypedDict, total=False):
    type: Required[Literal["dot"]]
    x: Required[Integer]
    y: Integer


class UntaggedDot(TypedDict, total=False):
    type: Literal["dot"]
    x: Required[Integer]
    y: Integer


class Text(TypedDict, total=False):
    type: Required[Literal["text"]]
    text: Required[str]


class Words(TypedDict, total=False):
    word: Literal["a", "b"]
    either: Annotated[str | bool, ByType("")]


APoint = Annotated[Point, Must("a point")]
Shape = Annotated[Dot | Text, ByTag("type", "a shape", ("image",))]


class Shapes(TypedDict, total=False):
    shape: Shape
    count: Annotated[int, Range(1, 2)]


TYPES: dict[str, Any] = {
    "text": str,
    "filled text": Filled,
    "bool": bool,
    "object": Json,
    "integer": Integer,
    "count": Annotated[int, Range(1)],
    "share": Annotated[int, Range(0, 3)],
    "number": Annotated[float, Range(-2, 2)],
    "top_p": Annotated[float, Range(0, 1, exclusive_low=True)],
    "word": Literal["auto", "none"],
    "token ids": TokenIds,
    "point": APoint,
    "points": Annotated[list[APoint], Must("points")],
    "shape": Shape,
    "item": Annotated[UntaggedDot | Text, ByTag("type", "an item", untagged="dot")],
    "item or text": Annotated[
        UntaggedDot | Text, ByTag("type", "an item", untagged="dot", bare=Text, unless=("x",))
    ],
    "others": Annotated[Dot | Json, ByTag("type", "an item", ("image",))],
    "text or ids": Annotated[str | TokenIds, ByType("text or token ids")],
    "lists of either": Annotated[
        TokenIds | Annotated[list[str], Must("texts", 1)], ByType("one list or another")
    ],
    "optional word": Annotated[Words, Must("")],
    "optional shape": Annotated[Shapes, Must("")],
}
BODIES = {name: create_model("It", __base__=Body, it=(kind, ...)) for name, kind in TYPES.items()}
VALUES: list[Any] = [
    "", "auto", "b", True, False, 0, 1, 3, -2, 4, 0.5, -0.1, 2.5, 10**30, 1e9 + 0.5, [], [1], [0, 1, 2], [1, 2, 3, 4],
    [-1], ["a"], ["a", 1], [1.5], [True], [{}], [{"x": 1}], [{"x": 1}, {"y": 1}], {}, {"x": 1}, {"x": 1, "y": None},
    {"x": "1"}, {"x": 1, "z": []}, {"type": "dot", "x": 1}, {"type": "dot"}, {"type": "text", "text": "a"},
    {"type": "image"}, {"type": 5}, {"type": None}, {"type": None, "x": 1}, {"type": []}, {"text": "a"},
    {"text": "a", "x": None, "type": None}, {"text": "a", "x": 1}, {"text": "a", "x": "1"}, {"text": 1},
    {"text": None}, {"word": "a"}, {"word": "c"}, {"word": None},
    {"either": None}, {"either": 1}, {"either": True}, {"shape": None, "count": None}, {"shape": {"type": "dot"}},
    {"shape": {"type": "dot", "x": 2}, "count": 3}, {"count": True}, {"type": "blob", "x": {}}, None,
]  # fmt: skip


def refusal(name: str, value: Any) -> RequestError | None:
    try:
        validate(BODIES[name], {"it": value})
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize("name", TYPES)
def test_a_type_accepts_exactly_what_its_schema_does(name: str) -> None:
    schema = schema_of(BODIES[name])
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for value in VALUES:
        assert (refusal(name, value) is None) == validator.is_valid({"it": value}), value


@pytest.mark.parametrize(
    ("name", "value", "param", "message"),
    [
        ("bool", 1, "it", "it must be true or false, not 1"),
        ("share", 4, "it", "it must be an integer from 0 to 3, not 4"),
        ("top_p", 0, "it", "it must be a number above 0 and at most 1, not 0"),
        ("word", "no", "it", 'it must be one of auto, none, not "no"'),
        ("token ids", [], "it", "it must be a list of token ids, not []"),
        ("token ids", [1, "a"], "it[1]", 'it[1] must be an integer of at least 0, not "a"'),
        ("points", [{"x": 1}, {"x": True}], "it[1].x", "it[1].x must be an integer, not true"),
        ("points", [{"x": 1}, 5], "it[1]", "it[1] must be a point, not 5"),
        ("point", {}, "it.x", "it.x is required: an integer"),
        ("point", {"x": None}, "it.x", "it.x is required: an integer"),
        ("share", None, "it", "it is required: an integer from 0 to 3"),
        ("shape", {"type": "dot"}, "it.x", "it.x is required: an integer"),
        ("shape", {"type": "blob"}, "it.type", 'it.type must be one of dot, text, not "blob"'),
        (
            "shape",
            {"type": "image"},
            "it.type",
            'it.type="image" is not supported: the model reads text only',
        ),
        ("text or ids", [0.5], "it[0]", "it[0] must be an integer of at least 0, not 0.5"),
        ("text or ids", 5, "it", "it must be text or token ids, not 5"),
        ("lists of either", [1, "a"], "it", 'it must be one list or another, not [1, "a"]'),
    ],
)
def test_a_refusal_names_the_innermost_value(name: str, value: Any, param: str, message: str) -> None:
    error = refusal(name, value)
    assert error is not None and (error.param, str(error)) == (param, message)


def test_nulls_are_left_out_and_unknown_fields_kept() -> None:
    value = {"x": 1, "y": None, "z": {"deep": None}}
    assert validate(BODIES["point"], {"it": value}).it == {"x": 1, "z": {"deep": None}}  # type: ignore[attr-defined]
    assert validate(BODIES["bool"], {"it": True, "more": 1, "null": None}).undeclared == {"more": 1}


def test_an_object_gets_the_tag_that_it_means() -> None:
    for value, tag in (({"x": 1}, "dot"), ({"text": "a"}, "text")):
        it = validate(BODIES["item or text"], {"it": value}).it  # type: ignore[attr-defined]
        assert it == {**value, "type": tag}


def test_a_long_value_is_shown_in_part() -> None:
    assert len(str(refusal("bool", "x" * 10_000))) < 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b'{"x": NaN}', b'{"x": Infinity}', b'{"x": "\\ud800"}', b'{"x": "\xff"}',
     b"[" * 10_000],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="request body"):
        read_body(BODIES["point"], body)
