"""The tags of tool calls, and searches for them in streamed text."""

from __future__ import annotations

import re
from typing import Literal

ToolCallForm = Literal["json", "xml"]
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
_CLOSING_TAGS = (TOOL_CALL_END, FUNCTION_END, PARAMETER_END)
# A closing tag after a call, even without its `>`.
CLOSING = re.compile(
    r"<[ \t]{0,4}/[ \t]{0,4}(?:tool_call|function|parameter)(?:[ \t]{0,4}>|[ \t]{0,4}(?=[\n<]))"
)
_MAX_CLOSING = 40  # characters that CLOSING may match
CLOSING_AT_THE_END = tuple(f"\n{tag}" for tag in _CLOSING_TAGS) + _CLOSING_TAGS
# What follows the end of an XML call: the next call, or (`inside`) a tag of this one, whose end was text in a value.
AFTER_XML = re.compile(
    rf"{TOOL_CALL}\s{{0,3}}[{{\[]|{FUNCTION}|^(?P<inside>[ \t]{{0,4}}</?parameter[=>])", re.MULTILINE
)
MAX_AFTER_XML = 24  # characters that AFTER_XML may match


def tool_call_form(template_source: str) -> ToolCallForm | None:
    """Returns the tool-call format of a template: "json" (Qwen3), "xml" (Qwen3-Coder), or None if it has none."""
    if FUNCTION in template_source:
        return "xml"
    return "json" if TOOL_CALL in template_source else None


def begins_closing_tag(text: str) -> bool:
    """Whether `text` is the start of a closing tag."""
    if len(text) > _MAX_CLOSING:
        return False
    compact = text.replace(" ", "").replace("\t", "")
    return any(tag.startswith(compact) for tag in _CLOSING_TAGS)


def rest_of_xml(text: str, start: int, until: int) -> int | None:
    """Returns where an XML call ends that continues after the end tag before `start`, None if it does not."""
    end = None
    while (after := AFTER_XML.search(text, start, until)) and after["inside"]:
        start = after.end()
        closing = text.find(TOOL_CALL_END, start, until)
        end = closing + len(TOOL_CALL_END) if closing >= 0 else until
    return end
