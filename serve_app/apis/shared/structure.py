"""The fields of a body that say which form the text must have: OpenAI's, vLLM's and vLLM's older ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.json_schema import loosened, without_options
from serve_app.apis.shared.body import Body, ByTag, ByType, Filled, Json, Must, about, ignored

NOT_SHOWN = "the form is not shown to the model, as in vLLM; say in the prompt what it should know."
_Schema = Annotated[Json | str | bool, ByType("a JSON schema")]
_Choices = Annotated[list[Filled], Must("a list of at least one non-empty string", 1)]


class _JsonSchema(TypedDict, total=False):
    name: Annotated[str, ignored(NOT_SHOWN)]
    description: Annotated[str, ignored(NOT_SHOWN)]
    schema: Required[Annotated[Json, about("JSON schema of the answer.")]]
    strict: Annotated[
        bool, about("Refuses a schema that cannot be held in full; else what cannot be held is left out.")
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
    regex: Annotated[str, about("Matches the whole text.")]
    choice: Annotated[_Choices, about("The text is one of these.")]
    grammar: Annotated[str, about("In Lark's or GBNF's form.")]


class StructureBody(Body):
    """At most one field may ask for a form."""

    response_format: (
        Annotated[
            _TextFormat | _ObjectFormat | _SchemaFormat,
            ByTag("type", "an object with type"),
            about("The form that the answer's text must have."),
        ]
        | None
    ) = None
    structured_outputs: (
        Annotated[
            _Structured,
            Must("an object with one of json, json_object, regex, choice and grammar"),
            about("The form that the answer's text must have."),
        ]
        | None
    ) = None
    guided_json: Annotated[_Schema, about("As structured_outputs.json.")] | None = None
    guided_regex: Annotated[str, about("As structured_outputs.regex.")] | None = None
    guided_choice: Annotated[_Choices, about("As structured_outputs.choice.")] | None = None
    guided_grammar: Annotated[str, about("As structured_outputs.grammar.")] | None = None


_NAMES = tuple(StructureBody.model_fields)


def structured_outputs(body: StructureBody) -> tuple[str, StructuredOutputs] | None:
    """What `body` asks of the text's form, with the field that asks. Raises RequestError if two fields do."""
    given = [name for name in _NAMES if name in body.model_fields_set]
    asked = {name: form for name in given if (form := _form(name, getattr(body, name))) is not None}
    if len(asked) > 1:
        first, second, *_ = asked
        raise RequestError(f"{second} and {first} both give a form; leave one out", param=second)
    for name, form in asked.items():
        known = {field: form[field] for field in _Structured.__annotations__ if field in form}
        if name != "response_format" and isinstance(known.get("json"), dict):
            known["json"] = without_options(known["json"])
        choice = {"choice": tuple(form["choice"])} if "choice" in form else {}
        return name, StructuredOutputs(**{**known, **choice})
    return None


def _form(name: str, value: Any) -> Json | None:
    """Arguments of StructuredOutputs; None where `value` asks for nothing."""
    if name == "structured_outputs":
        return value  # type: ignore[no-any-return]
    if name != "response_format":
        return {name.removeprefix("guided_"): value}
    if value["type"] == "json_schema":
        asked = value["json_schema"]
        schema = asked["schema"]
        return {"json": without_options(schema) if asked.get("strict") else _loosened(schema)}
    if value["type"] == "json_object":
        schema = value.get("schema")
        return {"json_object": True} if schema is None else {"json": _loosened({"type": "object", **schema})}
    return None


def _loosened(schema: Json) -> Json:
    try:
        return dict(loosened(schema))
    except RecursionError:
        raise RequestError("response_format is too deeply nested", param="response_format") from None
