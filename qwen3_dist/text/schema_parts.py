"""Parts of JSON schemas behind `$ref` and under `allOf`, `anyOf` and `oneOf`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

Json = Mapping[str, Any]
_MAX_DEPTH = 8  # of nested references and alternatives; deeper ones are ignored
_MAX_CHOICES = 10_000


def referenced(reference: Any, root: Any) -> Any:
    """Returns the part of `root` that a reference such as `#/$defs/a` names, None if there is none."""
    if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        return None
    for name in unquote(reference).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list):
            index = int(name) if name.isdecimal() and len(name) < 10 else len(root)
            root = root[index] if index < len(root) else None
        else:
            root = root.get(name) if isinstance(root, Mapping) else None
    return root


class ObjectSchema:
    """The `properties` and `required` names of a root `schema` for an object, including those behind references.

    A property described by several schemas gets them under `allOf`, one described by alternatives alone gets them
    under `anyOf`. A name is required if all alternatives require it. An invalid schema has no properties.
    """

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._definite: dict[str, list[Any]] = {}
        self._possible: dict[str, list[Any]] = {}
        self._visited: dict[int, frozenset[str]] = {}  # names that each schema requires
        self.required = self._visit(schema, self._definite, 0)
        self.properties = {
            **{name: _one(schemas, "anyOf") for name, schemas in self._possible.items()},
            **{name: _one(schemas, "allOf") for name, schemas in self._definite.items()},
        }

    def _visit(self, schema: Any, found: dict[str, list[Any]], depth: int) -> frozenset[str]:
        """Adds the properties of `schema` to `found`. Returns the names that it requires."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return frozenset()
        if id(schema) not in self._visited:
            self._visited[id(schema)] = frozenset()  # ends recursive references
            properties, required = schema.get("properties"), schema.get("required")
            for name, part in properties.items() if isinstance(properties, Mapping) else ():
                found.setdefault(name, []).append(part)
            names = set(map(str, required)) if isinstance(required, list) else set()
            for part in all_parts(schema, self._root):
                names |= self._visit(part, found, depth + 1)
            for options in alternatives(schema):
                names |= frozenset.intersection(
                    *[self._visit(option, self._possible, depth + 1) for option in options]
                )
            self._visited[id(schema)] = frozenset(names)
        return self._visited[id(schema)]


def choices(schema: Any, root: Any) -> list[Any]:
    """Returns the values that `schema`, a part of `root`, enumerates; [] if it does not, or has very many."""
    return _choices(schema, root, 0, {})


def _choices(schema: Any, root: Any, depth: int, visited: dict[int, list[Any]]) -> list[Any]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return []
    values = schema.get("enum")
    if isinstance(values, list) or "const" in schema:
        return values if isinstance(values, list) else [schema["const"]]
    if schema.get("type") == "null":
        return [None]
    if id(schema) not in visited:
        visited[id(schema)] = []
        for options in [[part] for part in all_parts(schema, root)] + alternatives(schema):
            found = [_choices(option, root, depth + 1, visited) for option in options]
            if all(found) and sum(map(len, found)) <= _MAX_CHOICES:
                visited[id(schema)] = [value for values in found for value in values]
                break
    return visited[id(schema)]


def all_parts(schema: Json, root: Any) -> list[Any]:
    """Returns the schemas that apply in addition to `schema`: its `$ref` within `root`, and its `allOf`."""
    others = schema.get("allOf")
    target = referenced(schema.get("$ref"), root)
    return ([] if target is None else [target]) + (others if isinstance(others, list) else [])


def alternatives(schema: Json) -> list[list[Any]]:
    """Returns the `anyOf` and `oneOf` lists of `schema`."""
    return [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) and schema[key]]


def _one(schemas: list[Any], keyword: str) -> Any:
    return schemas[0] if all(schema == schemas[0] for schema in schemas) else {keyword: schemas}
