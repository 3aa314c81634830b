"""Bodies for every field of a request's table, made of the table itself: two or more values of each field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from serve_app.apis.shared.kinds import Anything, Either, Field, Json, Kind, ListOf, Plain, Record, Tagged


@dataclass(frozen=True)
class Place:
    """A field somewhere in a body: `body(value)` has it there; it may be left out if not `field.required`."""

    path: str
    field: Field
    body: Callable[[Any], Any]
    fuller: Callable[[Any], Any]  # with all that may stand beside the field

    def bodies(self) -> list[list[Any]]:
        """With each sample value and without the field: alone, and beside its like."""
        values = [*samples(self.field.kind), *([] if self.field.required else [None])]
        return [[body(value) for value in values] for body in (self.body, self.fuller)]


def samples(kind: Kind) -> list[Any]:
    """Values that `kind` accepts, as different as it allows."""
    if isinstance(kind, Plain):
        return [value for value in _plain(kind.form) if kind.accepts(value)]
    if isinstance(kind, Anything):
        return [{"k": 1}, {"k": 2}]
    if isinstance(kind, ListOf):
        return [[value] for value in samples(kind.item)]
    if isinstance(kind, Record):
        least = {name: samples(field.kind)[0] for name, field in kind.fields.items() if field.required}
        full = {name: samples(field.kind)[0] for name, field in kind.fields.items()}
        others = [
            {**least, name: value}
            for name, field in kind.fields.items()
            if field.required
            for value in samples(field.kind)[1:]
        ]
        return [least, *others, *([full] if full != least else [])]
    if isinstance(kind, Tagged):
        return [
            {kind.tag: name, **value} for name, record in kind.records.items() for value in samples(record)
        ]
    assert isinstance(kind, Either)
    return [value for one in kind.kinds for value in samples(one)]


def _plain(form: Json) -> list[Any]:
    if "enum" in form:
        return list(form["enum"])
    low = form.get("minimum", form.get("exclusiveMinimum", 0))
    return {
        "string": ["first", "a-second-one"],
        "boolean": [True, False],
        "integer": [max(low, 1), max(low, 1) + 1],
        "number": [low + 0.25, low + 0.5],
        "object": [{"7": 1}, {"7": 2}, {"first": 1}, {"first": 2}],
    }[form["type"]]


def places(kind: Kind, path: str = "", body: Callable[[Any], Any] = lambda value: value) -> Iterator[Place]:
    """Every field of `kind` and of what it is made of."""
    if isinstance(kind, Record):
        for name, field in kind.fields.items():
            yield from _field(kind, name, field, path, body)
    elif isinstance(kind, ListOf):
        yield from places(kind.item, f"{path}[]", lambda value: body([value]))
    elif isinstance(kind, Either):
        for one in kind.kinds:
            yield from places(one, path, body)
    elif isinstance(kind, Tagged):
        for name, record in kind.records.items():
            tag = {kind.tag: name}
            yield from places(record, f"{path}<{name}>", lambda value, tag=tag: body({**tag, **value}))  # type: ignore[misc]


def _field(record: Record, name: str, field: Field, path: str, body: Callable[[Any], Any]) -> Iterator[Place]:
    least, *_, full = samples(record) * 2
    here = f"{path}.{name}" if path else name

    def put(value: Any) -> Any:
        return body({**least, name: value})

    yield Place(here, field, put, lambda value: body({**full, name: value}))
    yield from places(field.kind, here, put)
