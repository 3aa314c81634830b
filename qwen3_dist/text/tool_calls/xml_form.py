"""Tool calls in Qwen3-Coder's XML format: `<function=NAME>`, a `<parameter=KEY>` for each argument, `</function>`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from qwen3_dist.text.tool_calls.tags import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END, TOOL_CALL_END
from qwen3_dist.text.tool_schemas import ToolSchemas, typed_json

_MAX_NAME = 256  # characters
_NULLS = ("null", "None")  # in JSON and in Python, whose spelling the template renders
# Tags, including misspelt ones. The line break before a tag belongs to the tag.
_TAG = re.compile(
    r"<[ \t]*(?:(?:parameter|function)[ \t]*=|/[ \t]*(?:parameter|function)[ \t]*[>\n<])|</?tool_call>"
)
_PARTIAL_TAG = re.compile(r"\n?(?:<[ \t]*/?[ \t]*[a-z_]{0,9}[ \t]*)?\Z")


class XmlCall:
    """Incrementally parses one call in the template's strict format, from `<function=` on.

    Every tag is closed there, and values contain nothing that may be a tag of the call. `name` is known at its `>`.
    `pop_arguments` returns JSON. Values have the types of the tool's schema; those that can only be strings are
    streamed, without one newline at either end. `failed`: the text is not such a call.
    """

    def __init__(self, schemas: ToolSchemas, is_bare: bool) -> None:
        """`is_bare`: there is no `<tool_call>` around the call. Then its name must be that of a tool."""
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._schemas = schemas
        self._is_bare = is_bare
        self._step: Callable[[str], int] = self._read_function
        self._key = ""
        self._keys: set[str] = set()
        self._value = ""  # the value under way, unless it is streamed
        self._is_streaming = False
        self._written = Arguments(schemas)
        self._early = ""  # arguments that are certain before it is known whether the call ends

    def read(self, text: str) -> int:
        """Parses as far as is certain. Returns the index of the first character that is unread or not of the call."""
        at = 0
        while not (self.done or self.failed):
            length = self._step(text[at:])
            if not length:
                break
            at += length
        return at

    def pop_arguments(self) -> str:
        """Returns the arguments since the last call of this method, without the end of the last value."""
        early, self._early = self._early, ""
        return early if self.done else early + self._written.pop()

    def remaining_arguments(self) -> str:
        """Returns the arguments that `pop_arguments` has not returned, once the call has ended."""
        return self._written.pop()

    def _read_function(self, text: str) -> int:
        length = self._tag(text, FUNCTION)
        if length:
            self._step = self._read_name
        return length

    def _read_name(self, text: str) -> int:
        length, name = self._name(text)
        if name and not (name in self._schemas.names if self._is_bare else is_name(name)):
            self.failed = True
        elif name:
            self.name = self._written.name = name
            self._step = self._read_member
        return length

    def _read_member(self, text: str) -> int:
        length = self._tag(text, PARAMETER, FUNCTION_END)
        if text[:length].endswith(PARAMETER):
            self._step = self._read_key
        elif length:
            self._written.end()
            self.done = True
        return length

    def _read_key(self, text: str) -> int:
        length, self._key = self._name(text)
        self.failed = self.failed or self._key in self._keys
        if length:
            self._keys.add(self._key)
            self._step = self._read_first_newline
        return length

    def _read_first_newline(self, text: str) -> int:
        if text:
            self._step = self._read_value
        return 1 if text.startswith("\n") else self._read_value(text)

    def _read_value(self, text: str) -> int:
        tag = _TAG.search(text)
        begun = tag or _PARTIAL_TAG.search(text)
        assert begun is not None
        end = begun.start() - (tag is not None and text[: begun.start()].endswith("\n"))
        if end or tag is None:
            self._append(text[:end])
            return end
        ends = tag[0] == PARAMETER_END and self._may_follow(text[tag.end() :])
        if ends:
            self._early += self._written.pop()
            self._end_value()
            self._step = self._read_member
            return tag.end()
        self.failed = ends is False
        return 0

    def _may_follow(self, text: str) -> bool | None:
        """Whether the `text` after `</parameter>` shows that this tag ends the value; None if more text decides."""
        rest = text.lstrip()
        if rest.startswith(PARAMETER):
            length, key = _name(rest[len(PARAMETER) :])
            is_on_own_line = "\n" in text[: len(text) - len(rest)]
            if length == 0:
                return None
            return (
                length > 0
                and key not in self._keys
                and self._schemas.may_be_parameter(self.name or "", key, is_on_own_line)
            )
        end = "" if self._is_bare else TOOL_CALL_END
        after = rest.removeprefix(FUNCTION_END)
        if len(after) == len(rest):
            return None if any(tag.startswith(rest) for tag in (PARAMETER, FUNCTION_END)) else False
        after = after.lstrip()
        return True if after.startswith(end) else (None if end.startswith(after) else False)

    def _append(self, text: str) -> None:
        """Appends `text` to the value, and streams it if the value can only be a string."""
        if not text:
            return
        if self._is_streaming:
            self._written.extend_text(text)
            return
        self._value += text
        types = self._written.types(self._key)
        if types == {"string"} or (types == {"string", "null"} and not self._may_be_null()):
            self._written.begin_text(self._key, self._value)
            self._is_streaming, self._value = True, ""

    def _may_be_null(self) -> bool:
        return any(null.startswith(self._value.strip()) for null in _NULLS)

    def _end_value(self) -> None:
        if self._is_streaming:
            self._written.end_text()
        else:
            self._written.add(self._key, self._value)
        self._is_streaming, self._value = False, ""

    def _tag(self, text: str, *tags: str) -> int:
        """Returns the length of the tag, with white space, that `text` begins with; 0 if more text decides."""
        rest = text.lstrip()
        for tag in tags:
            if rest.startswith(tag):
                return len(text) - len(rest) + len(tag)
        self.failed = not any(tag.startswith(rest) for tag in tags)
        return 0

    def _name(self, text: str) -> tuple[int, str]:
        """Returns the length, including `>`, and the text of a name; 0 if more text decides."""
        length, name = _name(text)
        self.failed = length < 0
        return max(length, 0), name


class Arguments:
    """Builds the JSON of a call's arguments incrementally; `name` is the tool's."""

    def __init__(self, schemas: ToolSchemas, name: str = "") -> None:
        self.name = name
        self._schemas = schemas
        self._num = 0
        self._json = ""  # not popped yet

    def pop(self) -> str:
        """Returns the JSON since the last call of this method."""
        new, self._json = self._json, ""
        return new

    def types(self, key: str) -> frozenset[str] | None:
        return self._schemas.types(self.name, key)

    def add(self, key: str, value: str) -> None:
        """Adds an argument, converted to its type in the schema."""
        self._begin(key)
        self._json += typed_json(value, self.types(key))

    def begin_text(self, key: str, text: str) -> None:
        self._begin(key)
        self._json += '"' + _escaped(text)

    def extend_text(self, text: str) -> None:
        self._json += _escaped(text)

    def end_text(self) -> None:
        self._json += '"'

    def end(self) -> None:
        self._json += "}" if self._num else "{}"

    def _begin(self, key: str) -> None:
        self._json += (", " if self._num else "{") + json.dumps(key, ensure_ascii=False) + ": "
        self._num += 1


def _name(text: str) -> tuple[int, str]:
    """Returns the length, including `>`, and the text of a name; 0 if more text decides, -1 if it is not a name."""
    end = next((i for i, char in enumerate(text[:_MAX_NAME]) if char in "<>\n"), -1)
    if end >= 0 and text[end] == ">" and text[:end].strip():
        return end + 1, text[:end].strip()
    return (-1 if end >= 0 or len(text) >= _MAX_NAME else 0), ""


def is_name(text: str) -> bool:
    """Whether `text` is a valid function name."""
    return bool(text) and not any(char.isspace() or char in "<>{}=\"'" for char in text)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
