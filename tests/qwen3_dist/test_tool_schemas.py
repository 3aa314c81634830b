"""Tools' schemas where calls are held to them: what is refused names the tool and the place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.tool_grammar import compile_tool_calls
from tests.walks import BUNDLED, walker_of

TEXT: dict[str, Any] = {"type": "string"}
FORMS = pytest.mark.parametrize("form", ["json", "xml"])
# Schemas of one property `a`, and the place of what the library lacks.
LACKING: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "items": TEXT, "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "propertyNames": {"pattern": "^x"}}, "propertyNames"),
    ({"type": "array", "contains": TEXT}, "contains"),
    ({"type": "object", "properties": {"b": {"not": {"const": 1}}}}, "not"),
    ({"type": "object", "if": {"required": ["x"]}, "then": {"required": ["y"]}}, "then"),
    ({"type": "string", "format": "uri-reference"}, "format"),
    ({"type": "string", "pattern": "^(?!x)"}, "look-around"),
    (
        {"type": "object", "properties": {"x": {}, "y": {}, "z": {}}, "minProperties": 2},
        "minProperties|maxProperties",
    ),
    ({"type": "object", "additionalProperties": TEXT, "minProperties": 2}, "minProperties"),
    ({"type": "object", "patternProperties": {"^x": TEXT}, "minProperties": 2}, "minProperties"),
    ({"allOf": [{"type": "object", "minProperties": 2}, {"additionalProperties": TEXT}]}, "minProperties"),
    ({"oneOf": [TEXT, {"type": "string", "maxLength": 3}]}, "oneOf"),
    ({"type": "object", "dependentRequired": {"x": ["y"]}}, "dependentRequired"),
]


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def with_property(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}


@FORMS
def test_what_cannot_be_held_is_left_out_of_tools_that_are_not_strict(form: str) -> None:
    tools = [tool(f"f{i}", with_property(schema)) for i, (schema, _) in enumerate(LACKING)]
    grammar = compile_grammar(compile_tool_calls(tools, form=form))
    assert walker_of(BUNDLED).walk(grammar, 0).startswith("<tool_call>")


@pytest.mark.parametrize(
    ("schema", "keyword", "form"), [*((*case, "json") for case in LACKING), (*LACKING[5], "xml")]
)
def test_what_cannot_be_held_is_refused_of_a_strict_tool_by_name_and_place(
    schema: dict[str, Any], keyword: str, form: str
) -> None:
    tools = [tool("other", None), tool("mine", with_property(schema), strict=True)]
    with pytest.raises(RequestError, match=r"^tools .* 'mine': .* at properties\.a") as refused:
        compile_tool_calls(tools, form=form)
    assert refused.value.param == "tools"
    assert str(refused.value).endswith("leave it out, or make the tool not strict")


def test_names_of_a_form_that_may_repeat_are_refused_by_place() -> None:
    schema = with_property({"type": "object", "additionalProperties": TEXT, "minProperties": 2})
    with pytest.raises(RequestError, match=r"minProperties cannot .* at properties\.a; leave it out$"):
        compile_grammar(StructuredOutputs(json=schema))


@pytest.mark.parametrize(
    ("schema", "held", "excluded"),
    [
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, ["1.25", "1.001"], ["1", "1.0", "1.5"]),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ["0.001", "0.5"], ["0", "0.0", "-0"]),
        ({"exclusiveMinimum": 10.0, "exclusiveMaximum": 10.5}, ["10.001"], ["10", "10.00"]),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5", "-0.001"], ["0", "-0", "-0.0"]),
        ({"exclusiveMinimum": -10.5, "exclusiveMaximum": -10}, ["-10.001"], ["-10", "-10.0"]),
        ({"minimum": 1, "exclusiveMinimum": True, "maximum": 1.5}, ["1.001", "1.5"], ["1", "1.0"]),
        ({"exclusiveMinimum": 2**40, "maximum": 2**40 + 0.5}, [f"{2**40}.25"], [str(2**40)]),
        ({"exclusiveMinimum": 0, "maximum": 1}, ["0.000000001", "1"], ["0"]),
        ({"exclusiveMinimum": 1, "allOf": [{"exclusiveMaximum": 1.5}]}, ["1.001"], ["1", "1.0", "1.5"]),
        ({"anyOf": [{"exclusiveMaximum": 0}], "allOf": [{"minimum": -0.5}]}, ["-0.5"], ["0", "-0"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"exclusiveMinimum": 1}}, "maximum": 1.5}, ["1.5"], ["1"]),
    ],
)
def test_bounds_that_are_excluded_are_held(
    schema: dict[str, Any], held: list[str], excluded: list[str]
) -> None:
    grammar = compile_grammar(StructuredOutputs(json={"type": "number", **schema}))
    walker = walker_of(BUNDLED)
    assert {text: walker.admits(grammar, text) for text in (*held, *excluded)} == {
        **dict.fromkeys(held, True),
        **dict.fromkeys(excluded, False),
    }


@pytest.mark.parametrize("draft", ["draft-03", "draft-04", "draft-06", "draft-07"])
def test_keywords_hold_whatever_draft_a_schema_names(draft: str) -> None:
    named = {"$schema": f"http://json-schema.org/{draft}/schema#"}
    schema = {**named, "properties": {"a": {**named, "const": "x"}}, "required": ["a"]}
    grammar = compile_grammar(compile_tool_calls([tool("f", schema, strict=True)]))
    call = '<tool_call>\n{{"name": "f", "arguments": {{"a": "{}"}}}}\n</tool_call>'
    assert walker_of(BUNDLED).admits(grammar, call.format("x"))
    assert not walker_of(BUNDLED).admits(grammar, call.format("y"))


@FORMS
def test_a_client_gives_the_library_no_options(form: str) -> None:
    options = {"x-guidance": {"item_separator": "; ", "lenient": True}}
    numbers = {"type": "array", "items": {"type": "integer"}, **options}
    tools = [tool("f", {**with_property(numbers), **options}, strict=True)]
    grammar = compile_grammar(compile_tool_calls(tools, form=form))
    call = (
        "<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>"
        if form == "xml"
        else '{{"name": "f", "arguments": {{"a": {}}}}}'
    )
    for value, allowed in (("[1, 2]", True), ("[1; 2]", False)):
        text = f"<tool_call>\n{call.format(value)}\n</tool_call>"
        assert walker_of(BUNDLED).admits(grammar, text) == allowed
    with pytest.raises(RequestError, match='"not" cannot be enforced'):
        compile_grammar(StructuredOutputs(json=json.dumps({"not": {}, "x-guidance": {"lenient": True}})))


def test_a_place_deep_in_a_schema_is_named() -> None:
    schema = with_property({"anyOf": [TEXT, {"type": "array", "items": {"not": {}}}]})
    with pytest.raises(RequestError, match=r'"not" cannot be enforced at properties\.a\.anyOf\.1\.items;'):
        compile_tool_calls([tool("f", schema, strict=True)])


@FORMS
@pytest.mark.parametrize(
    "parameters",
    [True, [1], "{}", {"type": "sausage"}, {"properties": {"a": {"type": "sausage"}}}, {"required": 3}],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_schema_is_refused(parameters: Any, strict: bool, form: str) -> None:
    with pytest.raises(RequestError, match="^tools cannot be used because of 'f': ") as refused:
        compile_tool_calls([tool("f", parameters, strict=strict)], form=form)
    assert refused.value.param == "tools" and "\n" not in str(refused.value)


@FORMS
@pytest.mark.parametrize("parameters", [None, "absent"])
def test_a_tool_without_parameters_takes_none(parameters: Any, form: str) -> None:
    offered = tool("ping", None)
    if parameters == "absent":
        del offered["function"]["parameters"]
    grammar = compile_grammar(compile_tool_calls([offered], form=form))
    call = '{"name": "ping", "arguments": {}}' if form == "json" else "<function=ping>\n</function>"
    for seed in range(5):
        said = walker_of(BUNDLED).walk(grammar, seed)
        assert set(said.split("\n")) == {"<tool_call>", "</tool_call>", *call.split("\n")}


@FORMS
def test_a_named_tool_is_called_once(form: str) -> None:
    grammar = compile_grammar(compile_tool_calls([tool("a", {}), tool("b", None)], named="b", form=form))
    for seed in range(5):
        assert walker_of(BUNDLED).walk(grammar, seed).count("<tool_call>") == 1


def test_claude_codes_tasks_can_be_required() -> None:
    metadata = {"type": "object", "propertyNames": TEXT, "additionalProperties": {}}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"subject": {"description": "A title", **TEXT}, "metadata": metadata},
        "required": ["subject", "metadata"],
        "additionalProperties": False,
    }
    grammar = compile_grammar(
        compile_tool_calls([tool("TaskCreate", schema, strict=True)], named="TaskCreate")
    )
    text = '<tool_call>\n{"name": "TaskCreate", "arguments": {"subject": "x", "metadata": {"k": [1]}}}\n</tool_call>'
    assert walker_of(BUNDLED).admits(grammar, text)
    assert not walker_of(BUNDLED).admits(grammar, text.replace('{"k": [1]}', "3"))


INTEGER: dict[str, Any] = {"type": "integer"}
WHOLE = with_property(INTEGER)


@pytest.mark.parametrize(
    ("schema", "held", "refused"),
    [
        ({"$ref": "#/$defs/o", "$defs": {"o": WHOLE}}, ["3"], ["x"]),
        ({"$ref": "#/x/o", "x": {"o": WHOLE}}, ["3"], ["x"]),
        ({"allOf": [{"$ref": "#/$defs/o"}, {"properties": {"b": TEXT}}], "$defs": {"o": WHOLE}}, ["3"], ["x"]),
        ({"oneOf": [WHOLE, with_property({"type": "boolean"})]}, ["3", "true"], ["x"]),
        ({"required": ["a"], "properties": {"b": INTEGER, "a": {"$ref": "#/properties/b"}}}, ["3"], ["x"]),
        ({"required": ["a"], "properties": {"a": {"anyOf": [{"$ref": "#"}, INTEGER]}}}, ['{"a": 3}'], ["{}", "x"]),
        (with_property({"anyOf": [TEXT, {"type": "null"}]}), ["x", "null"], []),
        (with_property({"allOf": [TEXT, {"enum": ["x", "y"]}]}), ["x"], ["z", '"x"']),
        (with_property({"anyOf": [{"enum": ["x"]}, {"type": "null"}]}), ["x", "null"], ["z"]),
        ({"$defs": {"e": {"enum": ["x", 3]}}, **with_property({"$ref": "#/$defs/e"})}, ["x", "3"], ["z"]),
    ],
)  # fmt: skip
def test_the_xml_form_holds_parameters_that_stand_elsewhere(
    schema: dict[str, Any], held: list[str], refused: list[str]
) -> None:
    grammar = compile_grammar(compile_tool_calls([tool("f", schema)], form="xml"))
    text = "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert all(walker_of(BUNDLED).admits(grammar, text.format(value)) for value in held)
    assert not any(walker_of(BUNDLED).admits(grammar, text.format(value)) for value in refused)


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf"])
def test_alternatives_at_the_root_are_refused_of_a_strict_tool_in_xml(keyword: str) -> None:
    schema = {"properties": {"a": TEXT, "b": TEXT}, keyword: [{"required": ["a"]}, {"required": ["b"]}]}
    with pytest.raises(
        RequestError, match=r"'f': the XML format .* anyOf or oneOf .* make the tool not strict$"
    ):
        compile_tool_calls([tool("f", schema, strict=True)], form="xml")
    compile_tool_calls([tool("f", schema)], form="xml")


def test_annotations_do_not_fill_the_grammar() -> None:
    long = {"description": "x" * 200_000, **TEXT}
    form = compile_tool_calls([tool("f", with_property(long), strict=True)])
    assert form.grammar is not None and len(json.dumps(form.grammar)) < 1000
