"""The fields of a body that say which form the text must have: OpenAI's, vLLM's and vLLM's older ones."""

from __future__ import annotations

from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.json_schema import loosened, without_options
from serve_app.apis.shared.kinds import (
    BOOL,
    FILLED_TEXT,
    OBJECT,
    TEXT,
    Either,
    Field,
    Json,
    ListOf,
    Record,
    Tagged,
)

NOT_SHOWN = "the form is not shown to the model, as in vLLM; say in the prompt what it should know."
_SCHEMA = Either("a JSON schema", (OBJECT, TEXT, BOOL))
_CHOICES = ListOf(FILLED_TEXT, "a list of at least one non-empty string", least=1)
_JSON_SCHEMA = Record(
    "an object with name and schema",
    {
        "name": Field(TEXT, ignored=NOT_SHOWN),
        "description": Field(TEXT, ignored=NOT_SHOWN),
        "schema": Field(OBJECT, "JSON schema of the answer.", required=True),
        "strict": Field(
            BOOL, "Refuses a schema that cannot be held in full; else what cannot be held is left out."
        ),
    },
)
_FORMAT = Tagged(
    "an object with type",
    "type",
    {
        "text": Record("an object", {}),
        "json_object": Record("an object", {"schema": Field(OBJECT, "JSON schema of the object.")}),
        "json_schema": Record("an object", {"json_schema": Field(_JSON_SCHEMA, required=True)}),
    },
    {},
)
_STRUCTURED = Record(
    "an object with one of json, json_object, regex, choice and grammar",
    {
        "json": Field(_SCHEMA, "JSON schema."),
        "json_object": Field(BOOL, "Any JSON object."),
        "regex": Field(TEXT, "Matches the whole text."),
        "choice": Field(_CHOICES, "The text is one of these."),
        "grammar": Field(TEXT, "In Lark's or GBNF's form."),
    },
)
_OLDER = {
    "guided_json": ("json", _SCHEMA),
    "guided_regex": ("regex", TEXT),
    "guided_choice": ("choice", _CHOICES),
    "guided_grammar": ("grammar", TEXT),
}
STRUCTURE: dict[str, Field] = {
    "response_format": Field(_FORMAT, "The form that the answer's text must have."),
    "structured_outputs": Field(_STRUCTURED, "The form that the answer's text must have."),
    **{name: Field(kind, f"As structured_outputs.{new}.") for name, (new, kind) in _OLDER.items()},
}


def structured_outputs(given: Json) -> tuple[str, StructuredOutputs] | None:
    """What `given` asks of the text's form, with the field that asks. Raises RequestError if two fields do."""
    asked = {name: form for name in STRUCTURE if (form := _form(name, given.get(name))) is not None}
    if len(asked) > 1:
        first, second, *_ = asked
        raise RequestError(f"{second} and {first} both give a form; leave one out", param=second)
    for name, form in asked.items():
        known = {field: form[field] for field in _STRUCTURED.fields if field in form}
        if name != "response_format" and isinstance(known.get("json"), dict):
            known["json"] = without_options(known["json"])
        choice = {"choice": tuple(form["choice"])} if "choice" in form else {}
        return name, StructuredOutputs(**{**known, **choice})
    return None


def _form(name: str, value: Any) -> Json | None:
    """Arguments of StructuredOutputs; None where `value` asks for nothing."""
    if value is None or name != "response_format":
        return {_OLDER[name][0]: value} if name in _OLDER and value is not None else value
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
