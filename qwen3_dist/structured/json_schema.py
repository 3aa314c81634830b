"""Normalizes JSON schemas for llguidance, which does not support all keywords.

Only subschemas are changed: a property that is called `not`, or the objects of an `enum`, stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qwen3_dist.text.schema_parts import referenced

Json = Mapping[str, Any]
Path = tuple[str, ...]

# Keywords whose value is a schema, a list of schemas, or an object of schemas.
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
        "$schema",  # without it llguidance accepts the keywords of all drafts
        "default",
        "deprecated",
        "description",
        "example",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
        "x-guidance",  # options of llguidance, which clients must not set
    }
)
_IN_PLACE = frozenset({"$ref", "allOf", "anyOf", "dependentSchemas", "if", "not", "oneOf"})
_NOT_REGULAR = re.compile(r"\(\?<?[=!]|\\[1-9]|\\k<")  # look-around and back references
_EVERYTHING: tuple[Any, ...] = (True, {})
_LENIENT: Json = {"lenient": True}
_DEFINED = re.compile(r"#/(?:\$defs|definitions)/")
_MOST_MOVED = 64  # parts of a schema that are moved to $defs
_MOST_WALKED = (
    10_000  # subschemas that are searched for references, since moved parts may be as large as the whole
)
_HOLD_TOGETHER = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
_OPPOSITE = {
    "exclusiveMinimum": ("maximum", "exclusiveMaximum"),
    "exclusiveMaximum": ("minimum", "exclusiveMinimum"),
}
_BOUNDS = tuple(key for keys in _OPPOSITE.values() for key in keys)
_EXACT = 2**53  # whole numbers below it are exact as floats
NAMES_MAY_REPEAT = (
    "minProperties cannot be enforced where more than one name is open, since such names may repeat"
)


def subschemas(schema: Any, path: Path = ()) -> Iterator[tuple[Path, Json]]:
    """Yields `schema` and all its subschemas that are objects, each with its path. `schema` comes first."""
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for key, value in schema.items():
        for name, inner in _inner(key, value):
            yield from subschemas(inner, (*path, key, *name))


def normalized(schema: Any) -> Any:
    """`schema` without annotations, nulls, and keywords that allow every value.

    Keywords of old drafts are replaced by current ones. The mark of `loosened` is kept.
    """
    schema = _gathered(schema)
    shared = _shared_bounds(schema)
    fit = _mapped(schema, lambda part: _without_idle(part, shared))
    is_loosened = isinstance(schema, Mapping) and schema.get("x-guidance") == _LENIENT
    return {**fit, "x-guidance": _LENIENT} if is_loosened else fit


def loosened(schema: Json) -> Json:
    """`schema` for callers that are not strict: all parts that llguidance cannot enforce are left out."""
    return {**_mapped(_gathered(schema), _without_hard_parts), "x-guidance": _LENIENT}


def without_options(schema: Json) -> dict[str, Any]:
    """`schema` without options of llguidance, so not `loosened`."""
    return {key: value for key, value in schema.items() if key != "x-guidance"}


def has_names_that_may_repeat(schema: Any) -> bool:
    """Whether llguidance cannot enforce some `minProperties` in `schema`, because counted names may repeat.

    It lets each name of `properties` occur once. Names of `additionalProperties` and `patternProperties` may repeat,
    but the first of them differs from the required names.
    """
    return next(names_that_may_repeat(schema), None) is not None


def names_that_may_repeat(schema: Any) -> Iterator[Path]:
    """The paths of the subschemas that `has_names_that_may_repeat` is about."""
    return (path for path, inner in subschemas(schema) if _least_names(inner) > _sure_names(inner))


def _inner(key: str, value: Any) -> list[tuple[Path, Any]]:
    """The subschemas in `value` of keyword `key`, each with its path in it."""
    if key in _NAMED and isinstance(value, Mapping):
        return [((name,), inner) for name, inner in value.items()]
    if key in _LISTED and isinstance(value, list):
        return [((str(index),), inner) for index, inner in enumerate(value)]
    return [((), value)] if key in _ONE else []


def _mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`schema` with `change` applied to it and to each of its subschemas, outer ones first."""
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


def _gathered(schema: Any) -> Any:
    """`schema` with every referenced part moved to `$defs`, where it is found as a subschema and copied once only.

    Returns `schema` unchanged if that takes too many parts."""
    defined = schema.get("$defs") if isinstance(schema, Mapping) else None
    names: dict[str, str] = {}
    moved: dict[str, Any] = dict(defined) if isinstance(defined, Mapping) else {}
    pending, num_walked = [schema], 0
    while pending:
        for _, part in subschemas(pending.pop()):
            num_walked += 1
            if names and num_walked > _MOST_WALKED:
                return schema
            reference = str(part.get("$ref"))
            target: Any = referenced(reference, schema)
            if reference in names or not isinstance(target, Mapping | bool) or _DEFINED.match(reference):
                continue
            if len(names) == _MOST_MOVED:
                return schema
            name = f"{len(moved)}{re.sub('[^A-Za-z0-9_]', '.', reference[1:])}"
            while name in moved:
                name += "."
            names[reference] = name
            moved[name] = target if target is not schema else _without(schema, "$defs", "definitions", "$id")
            pending.append(moved[name])
    return _mapped({**schema, "$defs": moved}, lambda part: _renamed(part, names)) if names else schema


def _renamed(schema: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    name = names.get(str(schema.get("$ref")))
    return schema if name is None else {**schema, "$ref": f"#/$defs/{name}"}


def _without(schema: Any, *keys: str) -> Json:
    return {key: value for key, value in schema.items() if key not in keys}


def _shared_bounds(schema: Any) -> set[tuple[str, Any]]:
    """All bounds on numbers in `schema`, as (keyword, bound), if two subschemas may apply to one number; else none."""
    parts = [part for _, part in subschemas(schema)]
    if not any(part.keys() & _HOLD_TOGETHER for part in parts):
        return set()
    return {(key, part[key]) for part in parts for key in _BOUNDS if _is_number(part.get(key))}


def _without_idle(schema: dict[str, Any], shared: set[tuple[str, Any]]) -> dict[str, Any]:
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
            value = kept.pop(old)  # without keywords of _IN_PLACE both keywords mean the same
            kept.setdefault(new, value)
    _anchor(kept)
    _exclude(kept, "exclusiveMinimum", "minimum", shared)
    _exclude(kept, "exclusiveMaximum", "maximum", shared)
    return kept


def _anchor(schema: dict[str, Any]) -> None:
    """Replaces an `id` that is an anchor by `$anchor`, as drafts since 2019-09 have it."""
    for key in ("id", "$id"):
        if str(schema.get(key, "")).startswith("#"):
            schema.setdefault("$anchor", schema.pop(key)[1:])


def _exclude(schema: dict[str, Any], exclusive: str, inclusive: str, shared: set[tuple[str, Any]]) -> None:
    """Normalizes the exclusive bound of `schema`, which draft 4 gives as a boolean beside the keyword `inclusive`.

    llguidance wrongly allows an excluded whole number if the opposite bound, in this schema or in `shared`, is less
    than 1 away. In that case the bound is moved by at most a millionth of that distance.
    """
    if isinstance(schema.get(exclusive), bool):
        is_excluded = schema.pop(exclusive)
        if is_excluded and inclusive in schema:
            schema[exclusive] = schema.pop(inclusive)
    bound: Any = schema.get(exclusive)
    if not _is_number(bound) or bound != int(bound):
        return
    sign = 1 if exclusive == "exclusiveMinimum" else -1
    others = [other for key, other in (*schema.items(), *shared) if key in _OPPOSITE[exclusive]]
    distances = [sign * (other - bound) for other in others if _is_number(other)]
    nearest = min((distance for distance in distances if distance > 0), default=1)
    if nearest < 1:
        moved = bound + sign * 10.0 ** (math.floor(math.log10(nearest)) - 6)
        schema[exclusive] = moved if moved != bound else math.nextafter(bound, sign * math.inf)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _EXACT


def _least_names(schema: Json) -> int:
    least, kinds = schema.get("minProperties"), schema.get("type", "object")
    is_object = "object" in (kinds if isinstance(kinds, list) else [kinds])
    return least if isinstance(least, int) and is_object else 0


def _sure_names(schema: Json) -> float:
    """The number of different names that an object is certain to have if llguidance gives it at least as many."""
    required = schema.get("required")
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        return math.inf
    return 1 + len(set(map(str, required)) if isinstance(required, list) else ())


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


# Keywords that may have no effect, with a test of the keyword's value and of the schema that contains it.
_IDLE: dict[str, Callable[[Any, Json], bool]] = {
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
    if isinstance(pattern, str) and _NOT_REGULAR.search(pattern):
        del schema["pattern"]
    if isinstance(named, Mapping) and (len(named) > 1 or any(map(_NOT_REGULAR.search, named))):
        del schema["patternProperties"]  # llguidance does not support patterns that overlap
        schema.pop("additionalProperties", None)
    if _least_names(schema) > _sure_names(schema):
        del schema["minProperties"]
    return schema
