"""JSON schemas (2020-12) of bodies, each whole, without references: a page of OpenAPI has them where they are used."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

Json = dict[str, Any]


def schema_of(model: type[BaseModel]) -> Json:
    """What `model` takes. A field that may be left out may be null, whatever its default is."""
    made = model.model_json_schema(schema_generator=_Nullable)
    whole: Json = _whole(made, made.pop("$defs", {}))
    return whole


class _Nullable(GenerateJsonSchema):
    def model_field_schema(self, schema: core_schema.ModelField) -> Json:
        made = super().model_field_schema(schema)
        return _or_null(made) if schema["schema"]["type"] == "default" else made

    def typed_dict_field_schema(self, schema: core_schema.TypedDictField) -> Json:
        made = super().typed_dict_field_schema(schema)
        return made if schema.get("required") else _or_null(made)

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Json:
        return _or_null(self.generate_inner(schema["schema"]))

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _or_null(schema: Json) -> Json:
    if "anyOf" in schema:
        options = schema["anyOf"]
        return schema if {"type": "null"} in options else {**schema, "anyOf": [*options, {"type": "null"}]}
    if not schema.keys() & {"type", "$ref"} or isinstance(schema.get("type"), list):
        return schema  # any value, or null already
    if "type" in schema and not schema.keys() & {"enum", "const", "oneOf"}:
        return {**schema, "type": [schema["type"], "null"]}
    said = ("default", "description")
    bare = {name: value for name, value in schema.items() if name not in said}
    return {"anyOf": [bare, {"type": "null"}], **{name: schema[name] for name in said if name in schema}}


def _whole(schema: Any, parts: Json) -> Any:
    """`schema` with its parts in the places of their references, without the names that pydantic gives."""
    if isinstance(schema, list):
        return [_whole(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if "$ref" in schema:
        schema = {**parts[schema.pop("$ref").rpartition("/")[2]], **schema}
    return {
        name: _whole(value, parts)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and value is None)
    }
