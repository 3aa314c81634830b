"""The tags of tool calls in text that comes piece by piece."""

from __future__ import annotations

import re
from typing import Literal

ToolCallForm = Literal["json", "xml"]
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
_CLOSING_TAGS = (TOOL_CALL_END, FUNCTION_END, PARAMETER_END)
# Any of them after a call, though its `>` may be missing.
CLOSING = re.compile(
    r"<[ \t]{0,4}/[ \t]{0,4}(?:tool_call|function|parameter)(?:[ \t]{0,4}>|[ \t]{0,4}(?=[\n<]))"
)
_MOST_CLOSING = 40  # characters of it
CLOSING_AT_THE_END = tuple(f"\n{tag}" for tag in _CLOSING_TAGS) + _CLOSING_TAGS
# After the end of a call in XML: the next call begins, or this one goes on, since that end is text of a value.
AFTER_XML = re.compile(
    rf"{TOOL_CALL}\s{{0,3}}[{{\[]|{FUNCTION}|^(?P<inside>[ \t]{{0,4}}</?parameter[=>])", re.MULTILINE
)
MOST_AFTER_XML = 24  # characters of it


def tool_call_form(template_source: str) -> ToolCallForm | None:
    """The form that a chat template teaches: "json" as Qwen3's, "xml" as Qwen3-Coder's; None if it has none."""
    if FUNCTION in template_source:
        return "xml"
    return "json" if TOOL_CALL in template_source else None


def begins_closing_tag(text: str) -> bool:
    """Whether more text may make `text` a closing tag."""
    if len(text) > _MOST_CLOSING:
        return False
    compact = text.replace(" ", "").replace("\t", "")
    return any(tag.startswith(compact) for tag in _CLOSING_TAGS)


def rest_of_xml(text: str, start: int, until: int) -> int | None:
    """Where a call in XML ends that goes on after `start`, though an end of it is there; None if it does not."""
    end = None
    while (after := AFTER_XML.search(text, start, until)) and after["inside"]:
        start = after.end()
        closing = text.find(TOOL_CALL_END, start, until)
        end = closing + len(TOOL_CALL_END) if closing >= 0 else until
    return end
