"""Bodies for every field of a request, made of its JSON schema: two or more values of each field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema

Json = dict[str, Any]
_NULL = {"type": "null"}


@dataclass(frozen=True)
class Place:
    """A field somewhere in a body: `body(value)` has it there; it may be left out if not `required`."""

    path: str
    schema: Json
    required: bool
    body: Callable[[Any], Any]
    fuller: Callable[[Any], Any]  # with all that may stand beside the field

    @property
    def ignored(self) -> bool:
        """Whether the page says that nothing reads it."""
        return "Ignored: " in self.schema.get("description", "")

    def bodies(self) -> list[list[Any]]:
        """With each sample value and without the field: alone, and beside its like."""
        values = [*samples(self.schema), *([] if self.required else [None])]
        return [[body(value) for value in values] for body in (self.body, self.fuller)]


def samples(schema: Json) -> list[Any]:
    """Values that `schema` accepts, as different as it allows."""
    if options := _options(schema):
        return [value for option in options for value in samples(option)]
    if names := _names(schema):
        return names
    if not schema.keys() & {"type"}:
        return [{"k": 1}, {"k": 2}]
    if schema.get("properties"):
        return _objects(schema)
    if _type(schema) == "array":
        return [[value] for value in samples(schema["items"])]
    validator = jsonschema.Draft202012Validator(schema)
    return [value for value in _plain(schema) if validator.is_valid(value)]


def _objects(schema: Json) -> list[Any]:
    fields, required = _fields(schema), schema.get("required", [])
    least = {name: samples(field)[0] for name, field in fields.items() if name in required}
    full = {name: samples(field)[0] for name, field in fields.items()}
    others = [
        {**least, name: value} for name in fields if name in required for value in samples(fields[name])[1:]
    ]
    return [least, *others, *([full] if full != least else [])]


def _plain(schema: Json) -> list[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    return {
        "string": ["first", "a-second-one"],
        "boolean": [True, False],
        "integer": [max(low, 1), max(low, 1) + 1],
        "number": [low + 0.25, low + 0.5],
        "object": [{"7": 1}, {"7": 2}, {"first": 1}, {"first": 2}],
    }[_type(schema)]


def _type(schema: Json) -> str:
    kind = schema.get("type", "")
    return str(next(each for each in kind if each != "null") if isinstance(kind, list) else kind)


def _fields(schema: Json) -> dict[str, Json]:
    """The properties that may be something."""
    fields: dict[str, Json] = {name: f for name, f in schema["properties"].items() if f != _NULL}
    return fields


def _tag(form: Json) -> tuple[str, Json]:
    """The field that says which of several objects one is."""
    name = next(name for name in ("type", "role") if name in form["properties"])
    return name, form["properties"][name]


def listed_tags(schema: Json) -> set[str]:
    """The tags of the objects of which a value may be any."""
    return {name for form in _options(schema) for name in _names(form["properties"]["type"])}


def _names(schema: Json) -> list[Any]:
    """The texts that `schema` lists."""
    if "const" in schema:
        return [schema["const"]]
    options = [name for option in schema.get("anyOf", []) for name in _names(option)]
    return [name for name in schema.get("enum", options) if name is not None]


def _options(schema: Json) -> list[Json]:
    """The schemas of which a value may have any; of objects those whose tag is listed."""
    options = [option for option in schema.get("anyOf", []) if option != _NULL]
    return options + [form for form in schema.get("oneOf", []) if _names(_tag(form)[1])]


def places(schema: Json, path: str = "", body: Callable[[Any], Any] = lambda value: value) -> Iterator[Place]:
    """Every field of `schema` and of what it is made of."""
    for option in schema.get("anyOf", []):
        yield from places(option, path, body)
    for form in [form for form in _options(schema) if form in schema.get("oneOf", [])]:
        tag, tags = _tag(form)
        untagged = {**form, "properties": {n: f for n, f in form["properties"].items() if n != tag}}
        untagged["required"] = [name for name in form.get("required", []) if name != tag]
        for name in _names(tags):
            tagged = {tag: name}
            yield from places(
                untagged, f"{path}<{name}>", lambda value, tagged=tagged: body({**tagged, **value})
            )  # type: ignore[misc]
    if "items" in schema:
        yield from places(schema["items"], f"{path}[]", lambda value: body([value]))
    if "oneOf" not in schema and schema.get("properties"):
        for name, field in _fields(schema).items():
            yield from _field(schema, name, field, path, body)


def _field(schema: Json, name: str, field: Json, path: str, body: Callable[[Any], Any]) -> Iterator[Place]:
    least, *_, full = _objects(schema) * 2
    here = f"{path}.{name}" if path else name

    def put(value: Any) -> Any:
        return body({**least, name: value})

    required = name in schema.get("required", [])
    yield Place(here, field, required, put, lambda value: body({**full, name: value}))
    yield from places(field, here, put)
