"""What tools' JSON schemas say of their parameters' types, and values that were written as plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from qwen3_dist.text.schema_parts import ObjectSchema, choices, referenced
from qwen3_dist.text.tool_calls.lenient_json import lenient_json

_MOST_DEPTH = 8  # of references and alternatives; beyond, a value may be anything
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_WORDS = {"True": "true", "False": "false", "None": "null", "Null": "null"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_KEY = re.compile(r"[\w@.:/-]+(?: [\w@.:/-]+)*")
_MOST_DIGITS = 4000  # that Python converts


class ToolSchemas:
    """Of tools in OpenAI's form; `names` are theirs. What is no schema allows anything."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas = {function["name"]: function.get("parameters") for function in functions}
        self.names = frozenset(self._schemas)
        self._arguments: dict[str, ObjectSchema] = {}
        self._types: dict[tuple[str, str], frozenset[str] | None] = {}

    def may_be_parameter(self, name: str, key: str, is_on_own_line: bool) -> bool:
        """Whether `key` after `<parameter=` can be a parameter of tool `name`, and is no code that has the tag in it.

        `is_on_own_line`: the tag stands where the template has it, so that an unknown key is the model's mistake.
        """
        properties = self.arguments(name).properties
        may_be_unknown = is_on_own_line or not properties
        return key in properties or (may_be_unknown and _KEY.fullmatch(key) is not None)

    def types(self, name: str, key: str) -> frozenset[str] | None:
        """JSON types that parameter `key` of tool `name` may have; None: any. An unknown parameter is text."""
        if (name, key) not in self._types:
            properties = self.arguments(name).properties
            known = key in properties
            found = _types(properties[key], self._schemas[name], 0, {}) if known else frozenset({"string"})
            self._types[name, key] = found
        return self._types[name, key]

    def choices(self, name: str, key: str) -> list[Any]:
        """The values that parameter `key` of tool `name` may have; [] for others than a few."""
        return choices(self.arguments(name).properties.get(key), self._schemas.get(name))

    def arguments(self, name: str) -> ObjectSchema:
        """What the schema of tool `name` says of its arguments."""
        if name not in self._arguments:
            self._arguments[name] = ObjectSchema(self._schemas.get(name))
        return self._arguments[name]


def typed_json(text: str, types: frozenset[str] | None) -> str:
    """JSON of the value that `text` stands for: of one of `types` if it can be, else text, which has no quotes."""
    return _typed(text.strip(), types) or json.dumps(text, ensure_ascii=False)


def _typed(literal: str, types: frozenset[str] | None) -> str | None:
    fitting = _fitting(_WORDS.get(literal, literal), types)
    if fitting is None and types is not None:
        fitting = _container(literal, types) if "string" in types else _repaired(literal, types)
    return fitting


def _fitting(literal: str, types: frozenset[str] | None) -> str | None:
    """`literal` if it is JSON of one of `types` and no text. Null stands for no value of any type but text."""
    kind = _kind(literal)
    if kind in (None, "string"):
        return None
    if types is None or kind in types:
        return literal
    if kind == "number" and "integer" in types and float(literal).is_integer():
        exact = Decimal(literal)
        return str(int(exact)) if exact == exact.to_integral_value() else None
    fits = (kind == "integer" and "number" in types) or (kind == "null" and "string" not in types)
    return literal if fits else None


def _repaired(literal: str, types: frozenset[str]) -> str | None:
    """JSON of a value that cannot be text, as Python or a careless hand writes it."""
    if len(literal) > 1 and literal[0] in "\"'" and literal[-1] == literal[0]:
        return _typed(literal[1:-1].replace(f"\\{literal[0]}", literal[0]).strip(), types)
    if _NUMBER.fullmatch(literal):
        exact = Decimal(literal)
        if exact.adjusted() >= _MOST_DIGITS:
            return None
        is_whole = exact == exact.to_integral_value()
        if is_whole and types.isdisjoint(("integer", "number")):
            return {0: "false", 1: "true"}.get(int(exact)) if "boolean" in types else None
        return _fitting(str(int(exact) if is_whole else exact), types)
    return _fitting(_WORDS.get(literal.capitalize(), ""), types) or _container(literal, types)


def _container(literal: str, types: frozenset[str]) -> str | None:
    """JSON of a list or an object that is written as in Python, or not quite as JSON."""
    if {"{": "object", "[": "array"}.get(literal[:1]) not in types:
        return None
    read = lenient_json(literal)
    is_whole = not read.is_cut and not literal[read.end :].strip("}],; \n")
    return read.written if is_whole else None


def _kind(literal: str) -> str | None:
    """The JSON type of `literal`; None if it is no JSON."""
    try:
        value = json.loads(literal, parse_constant=_refuse, parse_int=_number_of_digits)
    except (ValueError, RecursionError):
        return None
    return "null" if value is None else _KINDS[type(value)]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def _number_of_digits(digits: str) -> int:
    """Stands for the number, which is not needed and may be too long to convert."""
    return len(digits)


def _types(
    schema: Any, root: Any, depth: int, visited: dict[int, frozenset[str] | None]
) -> frozenset[str] | None:
    """Types that `schema`, a part of `root`, allows; None: any."""
    if not isinstance(schema, dict) or depth > _MOST_DEPTH:
        return None
    if id(schema) not in visited:
        visited[id(schema)] = None  # for references that lead back here
        visited[id(schema)] = _types_of(schema, root, depth, visited)
    return visited[id(schema)]


def _types_of(
    schema: dict[str, Any], root: Any, depth: int, visited: dict[int, frozenset[str] | None]
) -> frozenset[str] | None:
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        nullable = ["null"] if schema.get("nullable") is True else []
        return _of_choices(frozenset(str(name) for name in [*named, *nullable]), schema)
    if "$ref" in schema:
        return _types(referenced(schema["$ref"], root), root, depth + 1, visited)
    if "enum" in schema or "const" in schema:
        return _kinds_of_choices(schema)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            options = [_types(option, root, depth + 1, visited) for option in schema[key]]
            return _combined(options, key == "allOf")
    return None


def _kinds_of_choices(schema: dict[str, Any]) -> frozenset[str]:
    values = schema.get("enum", [schema.get("const")])
    values = values if isinstance(values, list) else [values]
    return frozenset("null" if value is None else _KINDS.get(type(value), "") for value in values)


def _of_choices(types: frozenset[str], schema: dict[str, Any]) -> frozenset[str]:
    """Those of `types` that values of the schema's enum or const have, and null; all if none has one."""
    if not ("enum" in schema or "const" in schema):
        return types
    kinds = _kinds_of_choices(schema)
    wider = kinds | ({"integer", "number"} if kinds & {"integer", "number"} else set())
    return types & (wider | {"null"}) if types & wider else types


def _combined(options: list[frozenset[str] | None], all_hold: bool) -> frozenset[str] | None:
    known = [types for types in options if types is not None]
    if all_hold:
        return frozenset.intersection(*known) if known else None
    return frozenset().union(*known) if len(known) == len(options) else None
