"""A parser of blocks of almost valid XML calls: with missing tags, or with tags inside values."""

from __future__ import annotations

import re
from collections.abc import Container
from itertools import islice

from qwen3_dist.text.tool_calls.block import Block, WrittenCall
from qwen3_dist.text.tool_calls.lenient_json import lenient_json
from qwen3_dist.text.tool_calls.xml_form import Arguments, is_name
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
# Without a `>` after it, a name is one word.
_NAMED = re.compile(r"[^\S\n]*(?:([^<>\n]*)>|([^\s<>:=]*)[:=]?)")
_NEEDLESS = re.compile(rf"(?:\s*{_FUNCTION_END})*")
_MAX_TAGS = 20_000  # searched for the ends of a block's values; a block that needs more is not a call
_ENDS_FUNCTION = re.compile(rf"\s*(?:{_FUNCTION_END}\s*)*(?:{_FUNCTION}|</?tool_call>|\Z)")
_ENDS_VALUE = re.compile(
    rf"\s*(?:(?P<parameter>{_PARAMETER})|{_FUNCTION_END}(?={_ENDS_FUNCTION.pattern})|{_FUNCTION}|\Z)"
)
_ENDS_LINE = re.compile(r"[ \t]*(?:\n|\Z)")
_MAX_INDENT = 80
_WRAPS = ("<tool_call>", "</tool_call>")


def xml_block(text: str, schemas: ToolSchemas, names: Container[str] | None = None) -> Block:
    """Parses `text` as function calls. With `names`, only functions of these names are calls.

    A value ends at a `</parameter>` that another tag of the call follows. A value may contain tags, if they are
    balanced or in places where the call cannot have them. Without such an end the value ends at the first tag that
    could end it, preferably on a line of its own. If the text after the last call is not prose, nothing in the block
    is a call.
    """
    calls: list[WrittenCall] = []
    at = num_tags = 0
    is_closed, is_cut = True, False
    while begun := _BEGINS.match(text, at):
        function = _Function(text, begun.end(), schemas, _MAX_TAGS - num_tags)
        num_tags += function.num_tags
        if num_tags >= _MAX_TAGS:
            return Block()
        is_cut = is_cut or function.is_cut
        if function.arguments is None or not (names is None or function.name in names):
            break
        calls.append(WrittenCall(function.name, function.arguments))
        needless = _NEEDLESS.match(text, function.end)
        assert needless is not None
        at = needless.end()
        is_closed = is_closed and function.is_closed
    rest = text[at:]
    if calls and not is_prose(rest):
        return Block(rest=text, is_cut=True)
    return Block(tuple(calls), rest.lstrip() if calls else rest, is_cut, is_closed)


def is_prose(rest: str) -> bool:
    """Whether `rest`, after a call, is plain text: neither another call nor the rest of a value."""
    has_tags = _TAG.search(rest) or any(wrap in rest for wrap in _WRAPS)
    return not rest or (rest[0].isspace() and not has_tags)


class _Function:
    """Parses a call whose name begins at `start` of `text`. `arguments` is None if it is not a call."""

    def __init__(self, text: str, start: int, schemas: ToolSchemas, max_tags: int) -> None:
        self.arguments: str | None = None
        self.is_closed = True
        self.is_cut = False
        self.num_tags = 0  # searched for the ends of values
        self._max_tags = max_tags
        self._text = text
        self._schemas = schemas
        self._keys: set[str] = set()
        self.name, self.end = self._named(start)
        if is_name(self.name):
            self._read_body(Arguments(schemas, self.name))

    def _named(self, start: int) -> tuple[str, int]:
        """Returns the name at `start` and the index after it; "" if the text ends inside the name."""
        named = _NAMED.match(self._text, start)
        assert named is not None
        is_cut = named[1] is None and named.end() == len(self._text)
        return "" if is_cut else (named[1] or named[2] or "").strip(), named.end()

    def _read_body(self, arguments: Arguments) -> None:
        tag = _TAG.search(self._text, self.end)
        first = self._text[self.end : tag.start() if tag else len(self._text)].strip()
        if tag and tag.lastgroup == ("parameter" if first else "parameter_end"):
            return
        while tag and tag.lastgroup in ("parameter", "parameter_end"):
            self.end = tag.end()
            if tag.lastgroup == "parameter":
                key, start = self._named(tag.end())
                self.is_cut = key in self._keys
                if not key or self.is_cut:
                    return
                self._keys.add(key)
                arguments.add(key, self._value(start))
            tag = _TAG.search(self._text, self.end)
        self.is_closed = self.is_closed and tag is not None
        if tag:
            self.end = tag.end() if tag.lastgroup == "function_end" else tag.start()
        elif first:
            self.end = len(self._text)
        arguments.end()
        self.arguments = _json_object(first) if first else arguments.pop()

    def _value(self, start: int) -> str:
        """Returns the value at `start`, and sets `end` to the index after it and its closing tag."""
        depth, first, first_on_own_line = 0, None, None
        is_inline = self._text[start : start + 1] != "\n"
        for tag in islice(_TAG.finditer(self._text, start), self._max_tags - self.num_tags):
            self.num_tags += 1
            is_parameter = tag.lastgroup == "parameter"
            if tag.lastgroup is None or (
                is_parameter and not self._may_be_parameter(tag.end(), is_on_own_line=False)
            ):
                continue
            first = first or tag
            if not first_on_own_line and (is_inline or _is_first_on_line(self._text, tag.start())):
                first_on_own_line = tag if self._may_end_value(tag) else None
            if is_parameter:
                depth += 1
            elif tag.lastgroup == "parameter_end" and depth:
                depth -= 1
            elif tag.lastgroup == "parameter_end" and self._is_end(tag):
                self.end = tag.end()
                return _trimmed(self._text[start : tag.start()])
        end = first_on_own_line or first
        self.end = end.start() if end else len(self._text)
        value = self._text[start : self.end]
        self.is_cut = self.is_cut or end is None or any(wrap in value for wrap in _WRAPS)
        return _trimmed(value)

    def _is_end(self, tag: re.Match[str]) -> bool:
        """Whether the text after `tag`, a `</parameter>`, shows that it ends the value."""
        after = _ENDS_VALUE.match(self._text, tag.end())
        if after is None or after["parameter"] is None:
            return after is not None
        return self._may_be_parameter(after.end(), "\n" in self._text[tag.end() : after.start("parameter")])

    def _may_end_value(self, tag: re.Match[str]) -> bool:
        """Whether `tag` may end a value that lacks its `</parameter>`."""
        if tag.lastgroup == "parameter_end":
            return self._is_end(tag) or _ENDS_LINE.match(self._text, tag.end()) is not None
        if tag.lastgroup == "parameter":
            return self._named(tag.end())[0] not in self._keys
        return _ENDS_FUNCTION.match(self._text, tag.end()) is not None

    def _may_be_parameter(self, start: int, is_on_own_line: bool) -> bool:
        return self._schemas.may_be_parameter(self.name, self._named(start)[0], is_on_own_line)


def _is_first_on_line(text: str, at: int) -> bool:
    return text[max(0, at - _MAX_INDENT) : at].rstrip(" \t").endswith("\n")


def _trimmed(value: str) -> str:
    """Returns `value` without the line breaks that belong to its tags."""
    return value.removeprefix("\n").removesuffix("\n")


def _json_object(text: str) -> str | None:
    """Returns the JSON object that some models write in place of parameters, or None."""
    read = lenient_json(text)
    is_whole = text.startswith("{") and read.end == len(text) and not read.is_cut
    return read.written if is_whole else None
