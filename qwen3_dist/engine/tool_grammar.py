"""Grammars that make a model call one of the tools it is offered, in the form in which it was trained to call.

json  <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>                       (Qwen3)
xml   <tool_call>\\n<function=f>\\n<parameter=p>\\n...\\n</parameter>\\n</function>\\n</tool_call>   (Qwen3-Coder)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_dist.sampling_params import StructuredOutputs

Json = Mapping[str, Any]
_ANY_OBJECT: Json = {"type": "object"}
_XML_END = "\n</parameter>\n"
_ANY_TEXT = r"/(?s:.*)\n<\/parameter>\n/"  # and the lines that end it


def tool_call_grammar(
    tools: Sequence[Json], choice: str, parallel: bool = True, form: str = "json"
) -> StructuredOutputs:
    """The form of an answer that calls some of `tools` (OpenAI's objects), or the one that `choice` names.

    `choice` is "required" or a function's name; without `parallel` there is exactly one call. The arguments
    follow the tool's schema, any object where it has none.
    """
    functions = [tool["function"] for tool in tools if choice in ("required", tool["function"]["name"])]
    rules = ["start: call" if not parallel else 'start: call ("\\n" call)*']
    rules.append(
        r'call: <tool_call> "\n" ('
        + " | ".join(f"f{i}" for i in range(len(functions)))
        + r') "\n" </tool_call>'
    )
    for index, function in enumerate(functions):
        rules += _RULES[form](f"f{index}", function["name"], function.get("parameters") or _ANY_OBJECT)
    return StructuredOutputs(grammar="\n".join(rules))


def _json_rules(rule: str, name: str, parameters: Json) -> list[str]:
    begins = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
    return [f'{rule}: {begins} {rule}_arguments "}}"', f"{rule}_arguments: %json {_schema(parameters)}"]


def _xml_rules(rule: str, name: str, parameters: Json) -> list[str]:
    """Parameters come in the schema's order, those that are not required may be missing."""
    required = parameters.get("required") or ()
    rules, parts = [], []
    for index, (key, schema) in enumerate((parameters.get("properties") or {}).items()):
        part = f"{rule}_{index}"
        parts.append(part if key in required else f"{part}?")
        rules.append(f"{part}: {json.dumps(f'<parameter={key}>{chr(10)}')} {part}_value")
        if _may_be_text(schema):
            rules.append(f"{part}_value[lazy]: {_ANY_TEXT}")
        else:
            value = _schema(_with_definitions(schema, parameters))
            rules.append(f"{part}_value: {part}_json {json.dumps(_XML_END)}\n{part}_json: %json {value}")
    return [f'{rule}: {json.dumps(f"<function={name}>" + chr(10))} {" ".join(parts)} "</function>"', *rules]


_RULES = {"json": _json_rules, "xml": _xml_rules}


def _schema(schema: Json) -> str:
    """One line of JSON, as the model was trained to write it: a space after commas and colons, no more."""
    return json.dumps(
        {
            **schema,
            "x-guidance": {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "},
        }
    )


def _may_be_text(schema: Any) -> bool:
    """Whether a value may be text that stands in the form as it is."""
    if not isinstance(schema, Mapping):
        return True
    kinds = schema.get("type")
    if kinds is None:
        return not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf"))
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def _with_definitions(schema: Json, parameters: Json) -> Json:
    """A property's schema with what its references point to."""
    return {**{key: parameters[key] for key in ("$defs", "definitions") if key in parameters}, **schema}
