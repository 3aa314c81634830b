"""Grammars of tool calls: they restrict the model to valid calls of the given tools, in the format of its training.

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
    has_names_that_may_repeat,
    loosened,
    normalized,
    without_options,
)
from qwen3_dist.text.schema_parts import alternatives
from qwen3_dist.text.tool_calls.stream import ToolCalls
from qwen3_dist.text.tool_calls.tags import FUNCTION, FUNCTION_END, PARAMETER, TOOL_CALL, TOOL_CALL_END
from qwen3_dist.text.tool_schemas import ToolSchemas

Json = Mapping[str, Any]
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
_XML_END = "\n</parameter>\n"
_ANY_TEXT = r"/(?s:.*)\n<\/parameter>\n/"  # any text up to the closing tag
_TEXT_WITHOUT_CALLS = r"/(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/"


def tool_call_grammar(
    tools: Sequence[Json],
    named: str | None = None,
    parallel: bool = True,
    form: str = "json",
    otherwise: Json | None = None,
    text: bool = False,
) -> StructuredOutputs:
    """The structured output of an answer that calls `tools` (objects of OpenAI's API), or only the tool `named`.

    There is exactly one call if `named` is given or `parallel` is false. Arguments follow the tool's schema; if the
    tool is not `strict`, as far as llguidance supports it. In the xml form, of a string's schema only `enum` and
    `const` are enforced. A tool without parameters takes no arguments. With `otherwise`, the answer may be JSON of
    that schema instead of calls; with `text`, any text may come before the calls or replace them. Raises RequestError
    (param "tools") for an invalid schema.
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
        schema = _spaced(normalized(otherwise), whitespace_pattern=WHITESPACE)
        rules[0] = f"start: calls | otherwise\notherwise: %json {schema}"
    for index, function in enumerate(functions):
        rules += _RULES[form](f"f{index}", function, _parameters(function))
    return StructuredOutputs(grammar="\n".join(rules))


def compile_tool_calls(tools: Sequence[Json], **options: Any) -> StructuredOutputs:
    """Returns `tool_call_grammar` after compiling it. Raises RequestError, which names the tool whose schema fails."""
    form = tool_call_grammar(tools, **options)
    functions = [tool["function"] for tool in tools]
    try:
        compile_grammar(form)
    except RequestError as error:
        _blame_one_of(functions)
        problem = str(error).partition(": ")[2]
        raise RequestError(f"tools cannot be used: {problem}", param="tools") from None
    strict = [function for function in functions if function.get("strict")]
    # Compiling does not find every fault: the xml form leaves parts of a schema out, and names that may repeat
    # compile.
    if options.get("form") == "xml" or any(has_names_that_may_repeat(_parameters(each)) for each in strict):
        _blame_one_of(strict)
    return form


def _blame_one_of(functions: Sequence[Json]) -> None:
    """Raises RequestError for the first function whose schema llguidance cannot compile, if there is one."""
    fault = schema_fault([_parameters(function) for function in functions])
    if fault is not None:
        function = functions[fault.number]
        advice = ", or make the tool not strict" if fault.is_lacking and function.get("strict") else ""
        raise _unusable(function, f"of its parameters, {fault.sentence}{advice}") from None


def _parameters(function: Json) -> Json:
    """The schema of the arguments, normalized, and loosened if the tool is not strict. It is always of an object."""
    parameters = function.get("parameters")
    if parameters is None:
        return _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise _unusable(function, "its parameters must be a JSON schema of an object")
    kinds = parameters.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise _unusable(function, f"the type of its parameters must be object, not {json.dumps(kinds)}")
    try:
        fit: Json = normalized({**without_options(parameters), "type": "object"})
        return fit if function.get("strict") else loosened(fit)
    except RecursionError:
        raise _unusable(function, "its parameters are too deeply nested") from None


def _json_rules(rule: str, function: Json, parameters: Json) -> list[str]:
    begins = _literal(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
    return [f'{rule}: {begins} {rule}_arguments "}}"', f"{rule}_arguments: %json {_schema(parameters)}"]


def _xml_rules(rule: str, function: Json, parameters: Json) -> list[str]:
    """Rules of a call in the xml form: parameters in the order of the schema, optional ones may be missing.

    An optional parameter whose name or values cannot be parsed back is left out, unless the tool is strict.
    """
    name = function["name"]
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise _unusable(function, "properties must be an object and required a list")
    if function.get("strict") and alternatives(parameters):
        raise _unusable(
            function,
            "the XML format of calls does not support anyOf or oneOf at the root of its parameters; "
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
                    function, f"the XML format of calls cannot contain its parameter {key!r}; rename it"
                )
            continue
        part = f"{rule}_{index}"
        parts.append(part if key in required else f"{part}?")
        rules.append(f"{part}: {_literal(f'<parameter={key}>{chr(10)}')} {part}_value")
        is_text = "string" in (schemas.types(name, key) or {"string"})
        rules += _xml_value(f"{part}_value", texts, is_text, schema, parameters)
    return [f'{rule}: {_literal(f"<function={name}>{chr(10)}")} {" ".join(parts)} "</function>"', *rules]


def _xml_value(rule: str, texts: Sequence[str], is_text: bool, schema: Any, parameters: Json) -> list[str]:
    """Rules of a parameter's value and its closing tag: one of `texts`, or else a value of `schema`, a string as it is
    and any other value as JSON."""
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
    """Parses a call with `text` for parameter `key`. Returns [value], or [] if the call cannot be parsed back."""
    (name,) = schemas.names
    reader = ToolCalls("xml", schemas, only_calls=True)
    written = f"{FUNCTION}{name}>\n{PARAMETER}{key}>\n{text}{_XML_END}{FUNCTION_END}"
    read = reader.push(f"{TOOL_CALL}\n{written}\n{TOOL_CALL_END}") + reader.finish()
    try:
        arguments = json.loads("".join(call.arguments for call in read.tool_calls))
    except json.JSONDecodeError:  # no call, several calls, or a call without an end
        return []
    return [arguments[key]] if arguments.keys() == {key} and not read.content else []


_RULES = {"json": _json_rules, "xml": _xml_rules}


def _schema(schema: Json) -> str:
    """A JSON schema with the spacing of the model's training data."""
    return _spaced(schema, whitespace_flexible=False, key_separator=": ", item_separator=", ")


def _spaced(schema: Json, **spacing: Any) -> str:
    return json.dumps({**schema, "x-guidance": {**schema.get("x-guidance", {}), **spacing}})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _unusable(function: Json, problem: str) -> RequestError:
    return RequestError(f"tools cannot be used because of {function['name']!r}: {problem}", param="tools")
