"""Normalizing JSON schemas: keywords without effect are removed, unsupported ones are left out or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3_dist.structured.json_schema import (
    has_names_that_may_repeat,
    loosened,
    normalized,
    subschemas,
    without_options,
)

TEXT: dict[str, Any] = {"type": "string"}
IDLE: list[dict[str, Any]] = [
    {"propertyNames": TEXT},
    {"propertyNames": {"type": ["string", "null"], "description": "a key"}},
    {"propertyNames": True},
    {"propertyNames": {}},
    {"uniqueItems": False},
    {"uniqueItems": True, "maxItems": 1},
    {"not": False},
    {"contains": TEXT, "minContains": 0},
    {"minContains": 2},
    {"maxContains": 2},
    {"if": TEXT},
    {"then": TEXT},
    {"else": TEXT},
    {"dependentRequired": {}},
    {"dependentSchemas": {}},
    {"unevaluatedProperties": True},
    {"unevaluatedItems": {}},
    {"title": "A", "description": "b", "default": 1, "examples": [2], "deprecated": True, "$comment": "c"},
    {"required": None, "minLength": None},
    {"$schema": "https://example.com/of-our-own"},
    {"$schema": "http://json-schema.org/draft-04/schema#"},
    {"x-guidance": {"item_separator": "; "}},
    {"exclusiveMinimum": False, "exclusiveMaximum": False},
]
LACKING: list[dict[str, Any]] = [
    {"propertyNames": {"pattern": "^a"}},
    {"propertyNames": {"type": "integer"}},
    {"uniqueItems": True},
    {"not": TEXT},
    {"contains": TEXT},
    {"if": TEXT, "then": {"minLength": 2}},
    {"dependentRequired": {"a": ["b"]}},
    {"allOf": [{}], "unevaluatedProperties": False},
]


@pytest.mark.parametrize("idle", IDLE)
def test_what_adds_nothing_is_left_out(idle: dict[str, Any]) -> None:
    kept = {"maxItems": 1} if "maxItems" in idle else {}
    assert normalized(idle) == kept
    assert normalized({"properties": {"a": {"items": [idle]}}}) == {"properties": {"a": {"items": [kept]}}}


@pytest.mark.parametrize("lacking", LACKING)
def test_what_says_something_is_kept(lacking: dict[str, Any]) -> None:
    assert normalized(lacking) == lacking


@pytest.mark.parametrize("keyword", sorted({key for schema in (*IDLE, *LACKING) for key in schema}))
def test_a_property_or_value_called_like_a_keyword_stays(keyword: str) -> None:
    schema = {
        "properties": {keyword: {"enum": [{keyword: False}]}},
        "required": [keyword],
        "const": {keyword: False, "a": None},
        "$defs": {keyword: TEXT},
    }
    assert normalized(schema) == schema
    assert loosened(schema) == {**schema, "x-guidance": {"lenient": True}}


def test_only_what_was_loosened_keeps_an_option_of_the_library() -> None:
    options = {"x-guidance": {"lenient": True, "item_separator": "; "}}
    schema = {"properties": {"x-guidance": TEXT, "a": {**TEXT, **options}}, **options}
    plain = {"properties": {"x-guidance": TEXT, "a": TEXT}}
    assert normalized(schema) == plain
    assert normalized(loosened(schema)) == {**plain, "x-guidance": {"lenient": True}}
    assert without_options(schema).keys() == {"properties"}


def test_what_old_drafts_name_otherwise_has_the_name_of_today() -> None:
    assert normalized({"minimum": 3, "exclusiveMinimum": True, "id": "#a"}) == {
        "exclusiveMinimum": 3,
        "$anchor": "a",
    }


def test_an_excluded_bound_moves_off_bounds_that_hold_with_it_alone() -> None:
    def bound_beside(*others: dict[str, Any]) -> Any:
        items = [{"properties": {"a": {"items": part}}} for part in ({"exclusiveMinimum": 1}, *others)]
        return normalized({"allOf": items})["allOf"][0]["properties"]["a"]["items"]["exclusiveMinimum"]

    assert 1 < bound_beside({"maximum": 1}, {"maximum": 9}, {"exclusiveMaximum": 1.5}) < 1.000001
    for idle in ({"maximum": 2}, {"minimum": 1.5}, {"maximum": 0.5}, {"maximum": {}}, {"const": 1.5}):
        assert bound_beside(idle) == 1
    apart = {"properties": {"a": {"exclusiveMinimum": 1}, "b": {"maximum": 1.5}}}
    assert normalized(apart) == apart


def test_names_may_repeat_where_more_than_one_is_open() -> None:
    names = {"required": ["a", "b"], "properties": {"a": TEXT, "b": TEXT}}
    assert not has_names_that_may_repeat({"minProperties": 1})
    assert not has_names_that_may_repeat({**names, "minProperties": 3})
    assert not has_names_that_may_repeat({"additionalProperties": False, "minProperties": 2})
    for schema in ({"minProperties": 2}, {**names, "minProperties": 4}):
        assert has_names_that_may_repeat({"items": schema})
        assert "minProperties" not in loosened(schema)
    named = {"patternProperties": {"^a": TEXT}, "additionalProperties": False}
    assert has_names_that_may_repeat({**named, "minProperties": 2})


def test_properties_that_nothing_else_evaluates_are_additional_ones() -> None:
    assert normalized({"properties": {"a": TEXT}, "unevaluatedProperties": False}) == {
        "properties": {"a": TEXT},
        "additionalProperties": False,
    }
    assert normalized({"additionalProperties": TEXT, "unevaluatedProperties": False}) == {
        "additionalProperties": TEXT
    }
    assert normalized({"prefixItems": [TEXT], "unevaluatedItems": False}) == {
        "prefixItems": [TEXT],
        "items": False,
    }


@pytest.mark.parametrize("pattern", ["^(?!a)b", "(?=a)", "(?<=a)b", "(?<!a)b", r"(a)\1", r"(?<n>a)\k<n>"])
def test_patterns_beyond_automata_are_loosened(pattern: str) -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": pattern, "maxLength": 3}}}
    assert loosened(schema)["properties"] == {"a": {"type": "string", "maxLength": 3}}
    named = {"patternProperties": {pattern: TEXT}, "additionalProperties": False}
    assert loosened(named) == {"x-guidance": {"lenient": True}}


def test_other_patterns_are_not() -> None:
    schema = {
        "pattern": r"^(?:a|(?P<n>b))\d\.$",
        "patternProperties": {"^a": TEXT},
        "additionalProperties": False,
    }
    assert loosened(schema) == {**schema, "x-guidance": {"lenient": True}}


def test_a_reference_out_of_the_schema_is_loosened() -> None:
    here, there = {"$ref": "#/$defs/a"}, {"$ref": "https://example.com/a.json", "type": "string"}
    assert loosened({"properties": {"a": here, "b": there}})["properties"] == {"a": here, "b": TEXT}


@pytest.mark.parametrize("place", ["components/schemas/P", "properties/b~1c/items", "x%20y/0"])
def test_what_references_name_outside_of_definitions_is_read_like_them(place: str) -> None:
    part = {"minProperties": 2, "title": "P", "properties": {"n": {"$ref": f"#/{place}"}}}
    schema = {
        "properties": {"a": {"$ref": f"#/{place}"}, "b/c": {"items": part}},
        "components": {"schemas": {"P": part}},
        "x y": [part],
    }
    fit = normalized(schema)
    reference = fit["properties"]["a"]["$ref"]
    assert fit["$defs"] == {
        reference.rpartition("/")[2]: {"minProperties": 2, "properties": {"n": {"$ref": reference}}}
    }
    assert has_names_that_may_repeat(fit) and not has_names_that_may_repeat(loosened(schema))


def test_a_reference_to_the_whole_leads_to_a_copy_that_parts_can_share() -> None:
    schema = {"properties": {"a": {"$ref": "#"}}, "$defs": {"b": TEXT}}
    fit = normalized(schema)
    reference = fit["properties"]["a"]["$ref"]
    assert fit["$defs"] == {
        "b": TEXT,
        reference.rpartition("/")[2]: {"properties": {"a": {"$ref": reference}}},
    }
    assert normalized(fit) == fit
    for other in ("#/$defs/b", "#/nowhere", "https://example.com/a.json", "#b", {}, None):
        assert normalized({**schema, "properties": {"a": {"$ref": other}}})["$defs"] == {"b": TEXT}


def test_a_walk_finds_schemas_and_not_their_values() -> None:
    schema = {
        "anyOf": [{"items": {"not": TEXT}}],
        "properties": {"enum": {"enum": [TEXT]}},
        "additionalProperties": True,
    }
    assert [".".join(path) for path, _ in subschemas(schema)] == [
        "",
        "anyOf.0",
        "anyOf.0.items",
        "anyOf.0.items.not",
        "properties.enum",
    ]


def test_references_into_parts_that_hold_each_other_do_not_multiply_a_large_schema() -> None:
    inner: dict[str, Any] = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(4000)},
    }
    place, references = "#", {}
    for depth in range(40):
        inner = {"type": "object", "properties": {"a": inner}}
        place += "/properties/a"
        references[f"r{depth}"] = {"$ref": place}
    schema = {"type": "object", "properties": {**inner["properties"], **references}}
    assert len(json.dumps(normalized(schema))) < 2 * len(json.dumps(schema))
