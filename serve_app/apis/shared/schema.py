"""JSON schemas (2020-12) of request bodies for the OpenAPI page, with all `$ref` inlined."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

Json = dict[str, Any]


def schema_of(model: type[BaseModel]) -> Json:
    """Returns the schema of `model`. An optional field is also nullable, whatever its default."""
    schema = model.model_json_schema(schema_generator=_Nullable)
    inlined: Json = _inline(schema, schema.pop("$defs", {}))
    return inlined


class _Nullable(GenerateJsonSchema):
    """Makes the schema of every optional field accept null."""

    def model_field_schema(self, schema: core_schema.ModelField) -> Json:
        field = super().model_field_schema(schema)
        return _or_null(field) if schema["schema"]["type"] == "default" else field

    def typed_dict_field_schema(self, schema: core_schema.TypedDictField) -> Json:
        field = super().typed_dict_field_schema(schema)
        return field if schema.get("required") else _or_null(field)

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Json:
        return _or_null(self.generate_inner(schema["schema"]))

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _or_null(schema: Json) -> Json:
    if "anyOf" in schema:
        options = schema["anyOf"]
        return schema if {"type": "null"} in options else {**schema, "anyOf": [*options, {"type": "null"}]}
    if not schema.keys() & {"type", "$ref"} or isinstance(schema.get("type"), list):
        return schema  # accepts any value, or already null
    if "type" in schema and not schema.keys() & {"enum", "const", "oneOf"}:
        return {**schema, "type": [schema["type"], "null"]}
    annotations: Json = {name: schema[name] for name in ("default", "description") if name in schema}
    bare = {name: value for name, value in schema.items() if name not in annotations}
    return {"anyOf": [bare, {"type": "null"}], **annotations}


def _inline(schema: Any, definitions: Json) -> Any:
    """Returns `schema` with each `$ref` replaced by its definition, without pydantic's titles and null defaults."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if "$ref" in schema:
        schema = {**definitions[schema.pop("$ref").rpartition("/")[2]], **schema}
    return {
        name: _inline(value, definitions)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and value is None)
    }
