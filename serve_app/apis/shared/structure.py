"""The fields for structured outputs: OpenAI's `response_format`, vLLM's `structured_outputs` and older `guided_*`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.json_schema import loosened, without_options
from serve_app.apis.shared.body import Body, ByTag, ByType, Filled, Json, Must, about, ignored

NOT_SHOWN = "as in vLLM the model does not see the schema; describe the format in the prompt."
_Schema = Annotated[Json | str | bool, ByType("a JSON schema")]
_Choices = Annotated[list[Filled], Must("a list of at least one non-empty string", 1)]


class _JsonSchema(TypedDict, total=False):
    name: Annotated[str, ignored(NOT_SHOWN)]
    description: Annotated[str, ignored(NOT_SHOWN)]
    schema: Required[Annotated[Json, about("JSON schema of the answer.")]]
    strict: Annotated[
        bool, about("Refuses a schema with unsupported keywords, instead of ignoring these keywords.")
    ]


class _TextFormat(TypedDict):
    type: Literal["text"]


class _ObjectFormat(TypedDict, total=False):
    type: Required[Literal["json_object"]]
    schema: Annotated[Json, about("JSON schema of the object.")]


class _SchemaFormat(TypedDict):
    type: Literal["json_schema"]
    json_schema: Annotated[_JsonSchema, Must("an object with name and schema")]


class _Structured(TypedDict, total=False):
    json: Annotated[_Schema, about("JSON schema.")]
    json_object: Annotated[bool, about("Any JSON object.")]
    regex: Annotated[str, about("Regular expression that the whole text matches.")]
    choice: Annotated[_Choices, about("The text is one of these strings.")]
    grammar: Annotated[str, about("Context-free grammar, in Lark or GBNF.")]


class StructureBody(Body):
    """The fields for structured outputs, of which a request may set one."""

    response_format: (
        Annotated[
            _TextFormat | _ObjectFormat | _SchemaFormat,
            ByTag("type", "an object with type"),
            about("The format that the answer's text must have."),
        ]
        | None
    ) = None
    structured_outputs: (
        Annotated[
            _Structured,
            Must("an object with one of json, json_object, regex, choice and grammar"),
            about("The format that the answer's text must have."),
        ]
        | None
    ) = None
    guided_json: Annotated[_Schema, about("As structured_outputs.json.")] | None = None
    guided_regex: Annotated[str, about("As structured_outputs.regex.")] | None = None
    guided_choice: Annotated[_Choices, about("As structured_outputs.choice.")] | None = None
    guided_grammar: Annotated[str, about("As structured_outputs.grammar.")] | None = None


_NAMES = tuple(StructureBody.model_fields)


def structured_outputs(body: StructureBody) -> tuple[str, StructuredOutputs] | None:
    """Returns the field that sets a format and the format, None without one. Raises RequestError for two formats."""
    given = [name for name in _NAMES if name in body.model_fields_set]
    formats = {name: form for name in given if (form := _format(name, getattr(body, name))) is not None}
    if len(formats) > 1:
        first, second, *_ = formats
        raise RequestError(f"{second} and {first} both set the output format; leave one out", param=second)
    for name, form in formats.items():
        known = {field: form[field] for field in _Structured.__annotations__ if field in form}
        if name != "response_format" and isinstance(known.get("json"), dict):
            known["json"] = without_options(known["json"])
        choice = {"choice": tuple(form["choice"])} if "choice" in form else {}
        return name, StructuredOutputs(**{**known, **choice})
    return None


def _format(name: str, value: Any) -> Json | None:
    """Returns the arguments of StructuredOutputs for field `name`; None if `value` allows any text."""
    if name == "structured_outputs":
        return value  # type: ignore[no-any-return]
    if name != "response_format":
        return {name.removeprefix("guided_"): value}
    if value["type"] == "json_schema":
        schema = value["json_schema"]["schema"]
        is_strict = value["json_schema"].get("strict")
        return {"json": without_options(schema) if is_strict else _loosened(schema)}
    if value["type"] == "json_object":
        schema = value.get("schema")
        return {"json_object": True} if schema is None else {"json": _loosened({"type": "object", **schema})}
    return None


def _loosened(schema: Json) -> Json:
    try:
        return dict(loosened(schema))
    except RecursionError:
        raise RequestError("response_format is too deeply nested", param="response_format") from None
