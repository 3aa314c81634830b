"""Blocks of calls in Qwen3-Coder's XML form as models write them, with tags missing or values that hold tags."""

from __future__ import annotations

import re
from collections.abc import Container
from itertools import islice

from qwen3_dist.text.lenient_json import lenient_json
from qwen3_dist.text.tool_call_block import Block, WrittenCall
from qwen3_dist.text.tool_calls_xml import Arguments, is_name
from qwen3_dist.text.tool_schemas import ToolSchemas

_PARAMETER = r"<[ \t]*parameter[ \t]*="
_FUNCTION = r"<[ \t]*function[ \t]*="
_PARAMETER_END, _FUNCTION_END = (
    rf"<[ \t]*/[ \t]*{name}[ \t]*(?:>|(?=[\n<]|\Z))" for name in ("parameter", "function")
)
_TAG = re.compile(
    rf"(?P<parameter>{_PARAMETER})|(?P<parameter_end>{_PARAMETER_END})|{_FUNCTION}|(?P<function_end>{_FUNCTION_END})"
)
_BEGINS = re.compile(rf"\s*{_FUNCTION}")
# The `>` after a name may be missing; then its first word is the name.
_NAMED = re.compile(r"[^\S\n]*(?:([^<>\n]*)>|([^\s<>:=]*)[:=]?)")
_MOST_TAGS = 20_000  # looked at for the ends of a block's values; what needs more is no call
_ENDS_VALUE = re.compile(rf"\s*(?:{_PARAMETER}|{_FUNCTION_END}|{_FUNCTION}|\Z)")
_WRAPS = ("<tool_call>", "</tool_call>")


def xml_block(text: str, schemas: ToolSchemas, names: Container[str] | None = None) -> Block:
    """Reads `text` as calls of functions; only those of `names` make calls, where they are given.

    A value ends at the `</parameter>` after which another tag of the call comes. It may hold tags itself, if they are
    as balanced as a call's. Where there is no such end it ends at the first tag that could be one.
    """
    calls: list[WrittenCall] = []
    at = num_tags = 0
    is_closed, is_cut = True, False
    while begun := _BEGINS.match(text, at):
        function = _Function(text, begun.end(), schemas, _MOST_TAGS - num_tags)
        num_tags += function.num_tags
        if num_tags >= _MOST_TAGS:
            return Block()
        if function.arguments is None or not (names is None or function.name in names):
            break
        calls.append(WrittenCall(function.name, function.arguments))
        at = function.end
        is_closed, is_cut = is_closed and function.is_closed, is_cut or function.is_cut
    return Block(tuple(calls), text[at:].lstrip() if calls else text[at:], is_cut, is_closed)


class _Function:
    """A call whose name begins at `start` of `text`. `arguments` is None if it is none."""

    def __init__(self, text: str, start: int, schemas: ToolSchemas, most_tags: int) -> None:
        self.arguments: str | None = None
        self.is_closed = True
        self.is_cut = False
        self.num_tags = 0  # looked at for the ends of values
        self._most_tags = most_tags
        self._text = text
        self.name, self.end = self._named(start)
        if is_name(self.name):
            self._read_body(Arguments(schemas, self.name))

    def _named(self, start: int) -> tuple[str, int]:
        """A name and where it ends; "" where the text ends in it."""
        named = _NAMED.match(self._text, start)
        assert named is not None
        is_cut = named[1] is None and named.end() == len(self._text)
        return "" if is_cut else (named[1] or named[2] or "").strip(), named.end()

    def _read_body(self, arguments: Arguments) -> None:
        tag = _TAG.search(self._text, self.end)
        first = self._text[self.end : tag.start() if tag else len(self._text)].strip()
        if first and tag and tag.lastgroup == "parameter":
            return
        while tag and tag.lastgroup in ("parameter", "parameter_end"):
            self.end = tag.end()
            if tag.lastgroup == "parameter":
                key, start = self._named(tag.end())
                if not key:
                    return
                arguments.add(key, self._value(start))
            tag = _TAG.search(self._text, self.end)
        self.is_closed = self.is_closed and tag is not None
        if tag:
            self.end = tag.end() if tag.lastgroup == "function_end" else tag.start()
        elif first:
            self.end = len(self._text)
        arguments.end()
        self.arguments = _json_object(first) if first else arguments.take()

    def _value(self, start: int) -> str:
        """The value that begins at `start`; `end` lies after it, and after its own end tag."""
        depth, first = 0, len(self._text)
        for tag in islice(_TAG.finditer(self._text, start), self._most_tags - self.num_tags):
            self.num_tags += 1
            first = min(first, tag.start())
            if tag.lastgroup == "parameter":
                depth += 1
            elif tag.lastgroup == "parameter_end" and depth:
                depth -= 1
            elif tag.lastgroup == "parameter_end" and _ENDS_VALUE.match(self._text, tag.end()):
                self.end = tag.end()
                return _trimmed(self._text[start : tag.start()])
        self.end = first
        value = self._text[start:first]
        self.is_cut = self.is_cut or first == len(self._text) or any(wrap in value for wrap in _WRAPS)
        return _trimmed(value)


def _trimmed(value: str) -> str:
    """Without the line breaks that are the tags'."""
    return value.removeprefix("\n").removesuffix("\n")


def _json_object(text: str) -> str | None:
    """Some models write JSON where parameters belong."""
    read = lenient_json(text)
    is_whole = text.startswith("{") and read.end == len(text) and not read.is_cut
    return read.written if is_whole else None
