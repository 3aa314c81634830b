"""JSON schemas as people send them, made ready for the grammar library, which lacks some keywords.

A schema is walked where schemas stand, so that a property called `not` or an `enum` of objects stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]
Path = tuple[str, ...]

# Keywords that hold a schema, a list of schemas, or schemas by name.
_ONE = frozenset(
    {
        "additionalItems",
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_LISTED = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_NAMED = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_ANNOTATIONS = frozenset(
    {
        "$comment",
        "default",
        "deprecated",
        "description",
        "example",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    }
)
_IN_PLACE = frozenset({"$ref", "allOf", "anyOf", "dependentSchemas", "if", "not", "oneOf"})
_BEYOND_AUTOMATA = re.compile(r"\(\?<?[=!]|\\[1-9]|\\k<")  # look-around and references to groups
_EVERYTHING: tuple[Any, ...] = (True, {})


def subschemas(schema: Any, path: Path = ()) -> Iterator[tuple[Path, Json]]:
    """Every schema in `schema` that is an object, itself first, with the names that lead to it."""
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for key, value in schema.items():
        for name, inner in _inner(key, value):
            yield from subschemas(inner, (*path, key, *name))


def fitted(schema: Any) -> Any:
    """`schema` without what adds nothing for a generator: annotations, nulls, and keywords that allow every value."""
    return _mapped(schema, _without_idle)


def loosened(schema: Json) -> Json:
    """`schema` for a caller who does not insist on it: what the library cannot follow is left out, deep in it too."""
    return {**_mapped(schema, _without_hard_parts), "x-guidance": {"lenient": True}}


def at_its_root(schema: Json) -> Json:
    """`schema` with what a `$ref` at its root refers to in place of it; one that leads nowhere stays."""
    for _ in range(8):
        target = _referenced(str(schema.get("$ref", "")), schema)
        if not isinstance(target, Mapping):
            break
        schema = {**{key: value for key, value in schema.items() if key != "$ref"}, **target}
    return schema


def _inner(key: str, value: Any) -> list[tuple[Path, Any]]:
    """The schemas in `value` of keyword `key`, with their places in it."""
    if key in _NAMED and isinstance(value, Mapping):
        return [((name,), inner) for name, inner in value.items()]
    if key in _LISTED and isinstance(value, list):
        return [((str(index),), inner) for index, inner in enumerate(value)]
    return [((), value)] if key in _ONE else []


def _mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`schema` with `change` made of each schema in it, the outer ones first."""
    if not isinstance(schema, Mapping):
        return schema
    changed = change(dict(schema))
    for key, value in changed.items():
        if key in _NAMED and isinstance(value, Mapping):
            changed[key] = {name: _mapped(inner, change) for name, inner in value.items()}
        elif key in _LISTED and isinstance(value, list):
            changed[key] = [_mapped(inner, change) for inner in value]
        elif key in _ONE:
            changed[key] = _mapped(value, change)
    return changed


def _without_idle(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in schema.items()
        if not (key in _ANNOTATIONS or (value is None and key != "const"))
        and not (key in _IDLE and _IDLE[key](value, schema))
    }
    for old, new in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if (
            old in kept
            and not kept.keys() & _IN_PLACE
            and (old != "unevaluatedItems" or "contains" not in kept)
        ):
            value = kept.pop(old)  # nothing else evaluates what these keywords do not
            kept.setdefault(new, value)
    return kept


def _every_string(value: Any, schema: Json) -> bool:
    """Whether the schema `value` allows every name of a property."""
    if not isinstance(value, Mapping):
        return value is True
    rest = {
        key: part
        for key, part in value.items()
        if key not in _ANNOTATIONS and part not in (("minLength", 0),)
    }
    kinds = rest.pop("type", "string")
    return not rest and "string" in (kinds if isinstance(kinds, list) else [kinds])


# Keywords that may allow everything: whether they do, by their value and the schema around them.
_IDLE: dict[str, Callable[[Any, Json], bool]] = {
    "$schema": lambda value, schema: "json-schema.org/" not in str(value),
    "propertyNames": _every_string,
    "uniqueItems": lambda value, schema: value is False or schema.get("maxItems", 2) in (0, 1),
    "not": lambda value, schema: value is False,
    "contains": lambda value, schema: schema.get("minContains") == 0 and "maxContains" not in schema,
    "minContains": lambda value, schema: value == 0 or "contains" not in schema,
    "maxContains": lambda value, schema: "contains" not in schema,
    "if": lambda value, schema: not schema.keys() & {"then", "else"},
    "then": lambda value, schema: "if" not in schema,
    "else": lambda value, schema: "if" not in schema,
    "dependentRequired": lambda value, schema: value == {},
    "dependentSchemas": lambda value, schema: value == {},
    "dependencies": lambda value, schema: value == {},
    "unevaluatedProperties": lambda value, schema: value in _EVERYTHING,
    "unevaluatedItems": lambda value, schema: value in _EVERYTHING,
}


def _without_hard_parts(schema: dict[str, Any]) -> dict[str, Any]:
    pattern, named = schema.get("pattern"), schema.get("patternProperties")
    if not str(schema.get("$ref", "#")).startswith("#"):
        del schema["$ref"]
    if isinstance(pattern, str) and _BEYOND_AUTOMATA.search(pattern):
        del schema["pattern"]
    if isinstance(named, Mapping) and (len(named) > 1 or any(map(_BEYOND_AUTOMATA.search, named))):
        del schema["patternProperties"]  # those that overlap are beyond the library as well
        schema.pop("additionalProperties", None)
    return schema


def _referenced(reference: str, root: Any) -> Any:
    """The part of `root` that a reference such as `#/$defs/a` names; None if there is none."""
    if not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        root = root.get(name) if isinstance(root, Mapping) else None
    return root
