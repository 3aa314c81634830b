"""Parameter types in tools' JSON schemas, and conversion of values written as plain text to these types."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from qwen3_dist.text.schema_parts import ObjectSchema, choices, referenced
from qwen3_dist.text.tool_calls.lenient_json import lenient_json

_MAX_DEPTH = 8  # of nested references and alternatives; beyond it any type is allowed
_TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null", "Null": "null"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_KEY = re.compile(r"[\w@.:/-]+(?: [\w@.:/-]+)*")
_MAX_DIGITS = 4000  # below the limit of Python's int conversion


class ToolSchemas:
    """The parameter schemas of `tools` in OpenAI's format, by tool name. An invalid schema allows anything."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas = {function["name"]: function.get("parameters") for function in functions}
        self.names = frozenset(self._schemas)
        self._arguments: dict[str, ObjectSchema] = {}
        self._types: dict[tuple[str, str], frozenset[str] | None] = {}

    def may_be_parameter(self, name: str, key: str, is_on_own_line: bool) -> bool:
        """Whether `key` after `<parameter=` may be a parameter of tool `name`, and not text with such a tag in it.

        `is_on_own_line`: the tag begins a line, as in the template. Then an unknown key is the model's mistake.
        """
        properties = self.arguments(name).properties
        may_be_unknown = is_on_own_line or not properties
        return key in properties or (may_be_unknown and _KEY.fullmatch(key) is not None)

    def types(self, name: str, key: str) -> frozenset[str] | None:
        """Returns the JSON types of parameter `key` of tool `name`, None for any. An unknown one is a string."""
        if (name, key) not in self._types:
            properties = self.arguments(name).properties
            known = key in properties
            found = _types(properties[key], self._schemas[name], 0, {}) if known else frozenset({"string"})
            self._types[name, key] = found
        return self._types[name, key]

    def choices(self, name: str, key: str) -> list[Any]:
        """Returns the values of parameter `key` of tool `name` if the schema enumerates them, else []."""
        return choices(self.arguments(name).properties.get(key), self._schemas.get(name))

    def arguments(self, name: str) -> ObjectSchema:
        """Returns the properties and required names of tool `name`."""
        if name not in self._arguments:
            self._arguments[name] = ObjectSchema(self._schemas.get(name))
        return self._arguments[name]


def typed_json(text: str, types: frozenset[str] | None) -> str:
    """Returns JSON for `text`, which was written without quotes: of one of `types` if possible, else a string."""
    return _typed(text.strip(), types) or json.dumps(text, ensure_ascii=False)


def _typed(literal: str, types: frozenset[str] | None) -> str | None:
    json_text = _literal_of_type(_PYTHON_LITERALS.get(literal, literal), types)
    if json_text is None and types is not None:
        json_text = _container(literal, types) if "string" in types else _repaired(literal, types)
    return json_text


def _literal_of_type(literal: str, types: frozenset[str] | None) -> str | None:
    """Returns `literal` if it is JSON of one of `types`, else None. Strings are excluded; null fits any other type."""
    kind = _json_type(literal)
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
    """Returns JSON for a value that cannot be a string: a quoted value, a number, or a Python literal; else None."""
    if len(literal) > 1 and literal[0] in "\"'" and literal[-1] == literal[0]:
        return _typed(literal[1:-1].replace(f"\\{literal[0]}", literal[0]).strip(), types)
    if _NUMBER.fullmatch(literal):
        exact = Decimal(literal)
        if exact.adjusted() >= _MAX_DIGITS:
            return None
        is_whole = exact == exact.to_integral_value()
        if is_whole and types.isdisjoint(("integer", "number")):
            return {0: "false", 1: "true"}.get(int(exact)) if "boolean" in types else None
        return _literal_of_type(str(int(exact) if is_whole else exact), types)
    return _literal_of_type(_PYTHON_LITERALS.get(literal.capitalize(), ""), types) or _container(
        literal, types
    )


def _container(literal: str, types: frozenset[str]) -> str | None:
    """Returns JSON for a list or an object in lenient JSON, such as a Python literal; else None."""
    if {"{": "object", "[": "array"}.get(literal[:1]) not in types:
        return None
    read = lenient_json(literal)
    is_whole = not read.is_cut and not literal[read.end :].strip("}],; \n")
    return read.written if is_whole else None


def _json_type(literal: str) -> str | None:
    """Returns the JSON type of `literal`, None if it is not valid JSON."""
    try:
        value = json.loads(literal, parse_constant=_refuse_constant, parse_int=len)
    except (ValueError, RecursionError):
        return None
    return "null" if value is None else _TYPE_NAMES[type(value)]


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def _types(
    schema: Any, root: Any, depth: int, visited: dict[int, frozenset[str] | None]
) -> frozenset[str] | None:
    """Returns the types that `schema`, a part of `root`, allows, None for any type."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return None
    if id(schema) not in visited:
        visited[id(schema)] = None  # ends recursive references
        visited[id(schema)] = _types_of(schema, root, depth, visited)
    return visited[id(schema)]


def _types_of(
    schema: dict[str, Any], root: Any, depth: int, visited: dict[int, frozenset[str] | None]
) -> frozenset[str] | None:
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        nullable = ["null"] if schema.get("nullable") is True else []
        return _restrict_to_choices(frozenset(str(name) for name in [*named, *nullable]), schema)
    if "$ref" in schema:
        return _types(referenced(schema["$ref"], root), root, depth + 1, visited)
    if "enum" in schema or "const" in schema:
        return _types_of_choices(schema)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            options = [_types(option, root, depth + 1, visited) for option in schema[key]]
            return _combined(options, key == "allOf")
    return None


def _types_of_choices(schema: dict[str, Any]) -> frozenset[str]:
    values = schema.get("enum", [schema.get("const")])
    values = values if isinstance(values, list) else [values]
    return frozenset("null" if value is None else _TYPE_NAMES.get(type(value), "") for value in values)


def _restrict_to_choices(types: frozenset[str], schema: dict[str, Any]) -> frozenset[str]:
    """Returns `types` restricted to those of the values of `enum` or `const`, and null; all if that leaves none."""
    if not ("enum" in schema or "const" in schema):
        return types
    kinds = _types_of_choices(schema)
    wider = kinds | ({"integer", "number"} if kinds & {"integer", "number"} else set())
    return types & (wider | {"null"}) if types & wider else types


def _combined(options: list[frozenset[str] | None], all_hold: bool) -> frozenset[str] | None:
    known = [types for types in options if types is not None]
    if all_hold:
        return frozenset.intersection(*known) if known else None
    return frozenset().union(*known) if len(known) == len(options) else None
