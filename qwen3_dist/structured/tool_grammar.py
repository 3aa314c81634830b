"""Grammars that hold a model to calls of the tools it is offered, in the form in which it was trained to call.

json  <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>                       (Qwen3)
xml   <tool_call>\\n<function=f>\\n<parameter=p>\\n...\\n</parameter>\\n</function>\\n</tool_call>   (Qwen3-Coder)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar, schema_fault
from qwen3_dist.structured.grammar_trial import WHITESPACE
from qwen3_dist.structured.json_schema import (
    fitted,
    has_names_that_may_repeat,
    loosened,
    without_options,
)
from qwen3_dist.text.schema_parts import alternatives
from qwen3_dist.text.tool_calls.stream import ToolCalls
from qwen3_dist.text.tool_calls.tags import FUNCTION, FUNCTION_END, PARAMETER, TOOL_CALL, TOOL_CALL_END
from qwen3_dist.text.tool_schemas import ToolSchemas

Json = Mapping[str, Any]
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
_XML_END = "\n</parameter>\n"
_ANY_TEXT = r"/(?s:.*)\n<\/parameter>\n/"  # and the lines that end it
_TEXT_WITHOUT_CALLS = r"/(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/"


def tool_call_grammar(
    tools: Sequence[Json],
    named: str | None = None,
    parallel: bool = True,
    form: str = "json",
    otherwise: Json | None = None,
    text: bool = False,
) -> StructuredOutputs:
    """The form of an answer that calls some of `tools` (OpenAI's objects), or the one that is `named`.

    There is exactly one call of a named tool, and without `parallel`. The arguments follow the tool's schema, as far
    as the grammar library can where the tool is not `strict`; in the xml form texts are held to `enum` and `const`
    alone. A tool without parameters takes none. The answer may be JSON of the schema `otherwise` in place of calls,
    where that is given; with `text` any text may stand ahead of calls or alone.
    Raises RequestError (param "tools") for a schema that is none.
    """
    functions = [tool["function"] for tool in tools if named in (None, tool["function"]["name"])]
    bodies = " | ".join(f"f{i}" for i in range(len(functions)))
    rules = [
        "start: calls",
        'calls: call ("\\n" call)*' if parallel and named is None else "calls: call",
        f'call: <tool_call> "\\n" ({bodies}) "\\n" </tool_call>',
    ]
    if text:
        rules[0] = f"start: TEXT? calls?\nTEXT: {_TEXT_WITHOUT_CALLS}"
    elif otherwise is not None:
        rules[0] = (
            f"start: calls | otherwise\notherwise: %json {_spaced(fitted(otherwise), whitespace_pattern=WHITESPACE)}"
        )
    for index, function in enumerate(functions):
        rules += _RULES[form](f"f{index}", function, _parameters(function))
    return StructuredOutputs(grammar="\n".join(rules))


def compile_tool_calls(tools: Sequence[Json], **options: Any) -> StructuredOutputs:
    """`tool_call_grammar`, tried out as `compile_grammar` does. Raises RequestError that names the tool to blame."""
    form = tool_call_grammar(tools, **options)
    functions = [tool["function"] for tool in tools]
    try:
        compile_grammar(form)
    except RequestError as error:
        _blame_one_of(functions)
        problem = str(error).partition(": ")[2]
        raise RequestError(f"tools cannot be used: {problem}", param="tools") from None
    strict = [function for function in functions if function.get("strict")]
    # The grammar of the xml form has not all that a schema says, and none tells that names may repeat.
    if options.get("form") == "xml" or any(has_names_that_may_repeat(_parameters(each)) for each in strict):
        _blame_one_of(strict)
    return form


def _blame_one_of(functions: Sequence[Json]) -> None:
    """Raises RequestError for the first function whose schema the grammar library cannot follow."""
    fault = schema_fault([_parameters(function) for function in functions])
    if fault is not None:
        function = functions[fault.number]
        advice = ", or make the tool not strict" if fault.is_lacking and function.get("strict") else ""
        raise _unusable(function, f"of its parameters, {fault.sentence}{advice}") from None


def _parameters(function: Json) -> Json:
    """The schema that the arguments follow: an object's, without what adds nothing or is not insisted on."""
    parameters = function.get("parameters")
    if parameters is None:
        return _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise _unusable(function, "its parameters must be a JSON schema, which is an object")
    kinds = parameters.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise _unusable(function, f"the type of its parameters must be object, not {json.dumps(kinds)}")
    try:
        fit: Json = fitted({**without_options(parameters), "type": "object"})
        return fit if function.get("strict") else loosened(fit)
    except RecursionError:
        raise _unusable(function, "its parameters are too deeply nested") from None


def _json_rules(rule: str, function: Json, parameters: Json) -> list[str]:
    begins = _literal(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
    return [f'{rule}: {begins} {rule}_arguments "}}"', f"{rule}_arguments: %json {_schema(parameters)}"]


def _xml_rules(rule: str, function: Json, parameters: Json) -> list[str]:
    """Parameters come in the schema's order, those that are not required may be missing.

    An optional parameter of a tool that is not strict is left out if readers of the form would mistake its name.
    """
    name = function["name"]
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise _unusable(function, "properties must be an object and required a list")
    if function.get("strict") and alternatives(parameters):
        raise _unusable(
            function,
            "the XML form of calls cannot hold anyOf or oneOf at the root of its parameters; "
            "leave it out, or make the tool not strict",
        )
    schemas = ToolSchemas([{"name": name, "parameters": parameters}])
    required = schemas.arguments(name).required
    rules, parts = [], []
    for index, (key, schema) in enumerate(schemas.arguments(name).properties.items()):
        values = schemas.choices(name, key)
        texts = [text for value in values if _as_read(schemas, key, text := _xml_text(value)) == [value]]
        if (values and not texts) or not _as_read(schemas, key, ""):
            if key in required or function.get("strict"):
                raise _unusable(
                    function, f"the XML form of calls cannot hold its parameter {key!r}; rename it"
                )
            continue
        part = f"{rule}_{index}"
        parts.append(part if key in required else f"{part}?")
        rules.append(f"{part}: {_literal(f'<parameter={key}>{chr(10)}')} {part}_value")
        is_text = "string" in (schemas.types(name, key) or {"string"})
        rules += _xml_value(f"{part}_value", texts, is_text, schema, parameters)
    return [f'{rule}: {_literal(f"<function={name}>{chr(10)}")} {" ".join(parts)} "</function>"', *rules]


def _xml_value(rule: str, texts: Sequence[str], is_text: bool, schema: Any, parameters: Json) -> list[str]:
    """One of `texts`, or else a value of `schema` (text as it is, the rest as JSON), and the lines that end it."""
    if texts:
        return [f"{rule}: ({' | '.join(map(_literal, texts))}) {_literal(_XML_END)}"]
    if is_text:
        return [f"{rule}[lazy]: {_ANY_TEXT}"]
    shared = ("$defs", "definitions", "x-guidance")
    definitions = {key: parameters[key] for key in shared if key in parameters}
    return [
        f"{rule}: {rule}_json {_literal(_XML_END)}",
        f"{rule}_json: %json {_schema({**definitions, **schema})}",
    ]


def _xml_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_read(schemas: ToolSchemas, key: str, text: str) -> list[Any]:
    """The value that is read where `text` is written for parameter `key` of the tool of `schemas`; [] if none is."""
    (name,) = schemas.names
    reader = ToolCalls("xml", schemas, only_calls=True)
    written = f"{FUNCTION}{name}>\n{PARAMETER}{key}>\n{text}{_XML_END}{FUNCTION_END}"
    read = reader.push(f"{TOOL_CALL}\n{written}\n{TOOL_CALL_END}") + reader.finish()
    try:
        arguments = json.loads("".join(call.arguments for call in read.tool_calls))
    except json.JSONDecodeError:  # none, several, or one that is not closed
        return []
    return [arguments[key]] if arguments.keys() == {key} and not read.content else []


_RULES = {"json": _json_rules, "xml": _xml_rules}


def _schema(schema: Json) -> str:
    """As models were trained to write it."""
    return _spaced(schema, whitespace_flexible=False, key_separator=": ", item_separator=", ")


def _spaced(schema: Json, **spacing: Any) -> str:
    return json.dumps({**schema, "x-guidance": {**schema.get("x-guidance", {}), **spacing}})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _unusable(function: Json, problem: str) -> RequestError:
    return RequestError(f"tools cannot be used because of {function['name']!r}: {problem}", param="tools")
