"""What a JSON value may be, said once: the check, the sentence of a refusal and the JSON schema come of the same kind.

A null counts as absent, an unknown field is kept as it is, and a refusal names the innermost value that
is not as it should be, by a path such as `messages[0].role`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError

Json = dict[str, Any]
_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}


class Kind(ABC):
    """A kind of value of the JSON type `type`. `words` end the sentence "it must be ..."."""

    words: str
    type = ""

    @property
    @abstractmethod
    def schema(self) -> Json:
        """The JSON schema (2020-12) of the values of this kind."""

    @abstractmethod
    def read(self, value: Any, where: str) -> Any:
        """`value`, its nulls left out. Raises RequestError, whose param is a path that begins with `where`."""

    def takes(self, value: Any) -> bool:
        """Whether `value` has this kind's JSON type."""
        return _TYPES[self.type](value)

    def accepts(self, value: Any) -> bool:
        try:
            self.read(value, "")
        except RequestError:
            return False
        return True

    def refuse(self, value: Any, where: str) -> RequestError:
        return RequestError(f"{where} must be {self.words}, not {short(value)}", param=where)


@dataclass(frozen=True)
class Plain(Kind):
    """A value without parts; what its type leaves open, `ok` decides."""

    words: str
    form: Json
    ok: Callable[[Any], bool] = lambda value: True

    @property
    def type(self) -> str:  # type: ignore[override]
        kind: str = self.form["type"]
        return kind

    @property
    def schema(self) -> Json:
        return self.form

    def read(self, value: Any, where: str) -> Any:
        if not (self.takes(value) and self.ok(value)):
            raise self.refuse(value, where)
        return value


@dataclass(frozen=True)
class Anything(Kind):
    """Any JSON value but null."""

    words: str = "any JSON value"

    @property
    def schema(self) -> Json:
        return {"not": {"type": "null"}}

    def takes(self, value: Any) -> bool:
        return value is not None

    def read(self, value: Any, where: str) -> Any:
        if value is None:
            raise self.refuse(value, where)
        return value


@dataclass(frozen=True)
class ListOf(Kind):
    """A list of `least` to `most` items of one kind."""

    item: Kind
    words: str
    least: int = 0
    most: int | None = None
    type = "array"

    @property
    def schema(self) -> Json:
        bounds = {"minItems": self.least or None, "maxItems": self.most}
        return {"type": self.type, "items": self.item.schema} | _given(bounds)

    def read(self, value: Any, where: str) -> Any:
        most = len(value) if self.most is None and self.takes(value) else self.most
        if not self.takes(value) or not self.least <= len(value) <= (most or 0):
            raise self.refuse(value, where)
        item = self.item
        if isinstance(item, Plain) and all(item.takes(v) and item.ok(v) for v in value):
            return value  # token ids come by the hundred thousand
        return [item.read(v, f"{where}[{i}]") for i, v in enumerate(value)]


@dataclass(frozen=True)
class Field:
    """A field of an object: its kind, what it does, and whether it must be there.

    `ignored` says why it is right that nothing reads the field.
    """

    kind: Kind
    help: str = ""
    required: bool = False
    ignored: str = ""

    @property
    def schema(self) -> Json:
        schema = self.kind.schema if self.required else _or_null(self.kind.schema)
        told = [self.help, f"Ignored: {self.ignored}" if self.ignored else ""]
        description = " ".join(filter(None, told))
        return {**schema, "description": description} if description else schema


@dataclass(frozen=True)
class Record(Kind):
    """An object with fields of known kinds, and any others."""

    words: str
    fields: Mapping[str, Field]
    type = "object"

    @property
    def schema(self) -> Json:
        required = [name for name, field in self.fields.items() if field.required]
        schema = {
            "type": self.type,
            "properties": {name: field.schema for name, field in self.fields.items()},
        }
        return {**schema, "required": required} if required else schema

    def read(self, value: Any, where: str) -> Any:
        if not self.takes(value):
            raise self.refuse(value, where)
        given = _given(value)
        for name, field in self.fields.items():
            path = f"{where}.{name}" if where else name
            if name in given:
                given[name] = field.kind.read(given[name], path)
            elif field.required:
                raise RequestError(f"{path} is required: {field.kind.words}", param=path)
        return given

    def read_body(self, body: bytes) -> Json:
        """The fields that a request's JSON body gives. Raises RequestError."""
        try:
            value = pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RequestError(f"the request body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise RequestError("the request body must be a JSON object")
        fields: Json = self.read(value, "")
        return fields


@dataclass(frozen=True)
class Tagged(Kind):
    """An object whose field `tag` says which of several records it is; `refused` ones are known but not built.

    Without a tag it is the `untagged` record, if there is one; or the `bare` one, where it has fields that `bare`
    requires and none that `untagged` does. One with any other tag is kept as it is where `others` is true.
    """

    words: str
    tag: str
    records: Mapping[str, Record]
    refused: Mapping[str, str]
    untagged: str | None = None
    others: bool = False
    bare: str | None = None
    type = "object"

    @property
    def schema(self) -> Json:
        forms = [self._tagged(name) for name in self.records]
        if self.bare is not None:
            bare, absent = self.records[self.bare].schema, {"type": "null"}
            others = dict.fromkeys((self.tag, *self._required(self.untagged)), absent)
            forms.append({**bare, "properties": {**bare["properties"], **others}})
        if self.others:
            tag = {"type": "string", "not": {"enum": [*self.records, *self.refused]}}
            forms.append({"type": "object", "properties": {self.tag: tag}, "required": [self.tag]})
        return {"type": self.type, "oneOf": forms}

    def _tagged(self, name: str) -> Json:
        schema, tag = self.records[name].schema, {"type": "string", "const": name}
        tagged = {**schema, "properties": {self.tag: tag, **schema["properties"]}}
        if name == self.untagged:
            return {**tagged, "properties": {**tagged["properties"], self.tag: {"enum": [name, None]}}}
        return {**tagged, "required": [self.tag, *schema.get("required", [])]}

    def read(self, value: Any, where: str) -> Any:
        if not self.takes(value):
            raise self.refuse(value, where)
        name, path = value.get(self.tag), f"{where}.{self.tag}"
        if name is None and self._is_bare(value):
            assert self.bare is not None
            return {**self.records[self.bare].read(value, where), self.tag: self.bare}
        name = self.untagged if name is None else name
        if isinstance(name, str) and name in self.refused:
            raise RequestError(f"{path}={short(name)} {self.refused[name]}", param=path)
        if self.others and isinstance(name, str) and name not in self.records:
            return _given(value)
        if not isinstance(name, str) or name not in self.records:
            raise RequestError(
                f"{path} must be one of {', '.join(self.records)}, not {short(name)}", param=path
            )
        return self.records[name].read(value, where)

    def _is_bare(self, value: Json) -> bool:
        given = _given(value).keys()
        return bool(given & self._required(self.bare)) and not given & self._required(self.untagged)

    def _required(self, name: str | None) -> set[str]:
        """The fields that the record `name` requires."""
        fields = {} if name is None else self.records[name].fields
        return {field for field, kind in fields.items() if kind.required}


@dataclass(frozen=True)
class Either(Kind):
    """A value of one of several kinds."""

    words: str
    kinds: tuple[Kind, ...]

    @property
    def schema(self) -> Json:
        return {"anyOf": [kind.schema for kind in self.kinds]}

    def takes(self, value: Any) -> bool:
        return any(kind.takes(value) for kind in self.kinds)

    def read(self, value: Any, where: str) -> Any:
        of_its_type = [kind for kind in self.kinds if kind.takes(value)]
        chosen = of_its_type if len(of_its_type) == 1 else [k for k in of_its_type if k.accepts(value)]
        if not chosen:
            raise self.refuse(value, where)
        return chosen[0].read(value, where)


ANYTHING = Anything()
TEXT = Plain("a string", {"type": "string"})
FILLED_TEXT = Plain("a non-empty string", {"type": "string", "minLength": 1}, bool)
BOOL = Plain("true or false", {"type": "boolean"})
OBJECT = Plain("an object", {"type": "object"})


def integer(low: int | None = None, high: int | None = None) -> Plain:
    bounds = _given({"minimum": low, "maximum": high})
    return Plain(_with_range("an integer", low, high), {"type": "integer", **bounds}, _within(low, high))


def number(low: float, high: float) -> Plain:
    schema = {"type": "number", "minimum": low, "maximum": high}
    return Plain(_with_range("a number", low, high), schema, _within(low, high))


def number_above(low: float, high: float) -> Plain:
    schema = {"type": "number", "exclusiveMinimum": low, "maximum": high}
    return Plain(f"a number above {low} and at most {high}", schema, lambda v: low < v <= high)


def one_of(*words: str) -> Plain:
    return Plain(f"one of {', '.join(words)}", {"type": "string", "enum": list(words)}, words.__contains__)


def short(value: Any) -> str:
    """`value` as JSON that fits in a sentence."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _given(fields: Mapping[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _or_null(schema: Json) -> Json:
    if "type" not in schema and "anyOf" not in schema:
        return {}  # any value, null as well
    if "anyOf" in schema:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema or "oneOf" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def _within(low: float | None, high: float | None) -> Callable[[Any], bool]:
    return lambda value: (low is None or value >= low) and (high is None or value <= high)


def _with_range(noun: str, low: float | None, high: float | None) -> str:
    if low is None:
        return noun
    return f"{noun} of at least {low}" if high is None else f"{noun} from {low} to {high}"
