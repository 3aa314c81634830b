"""A tool call in Qwen3-Coder's XML form: `<function=NAME>`, a `<parameter=KEY>` for each argument, `</function>`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from qwen3_dist.text.tool_schemas import ToolSchemas, typed_json

FUNCTION = "<function="
_PARAMETER, _END, _OUTER_END = "<parameter=", "</function>", "</tool_call>"
_MOST_NAME = 256  # characters; what is longer is no name
_NULLS = ("null", "None")  # as JSON and as Python write it, which the models' template does


def _beginning_of(tag: str) -> str:
    """A pattern of what may become `tag`."""
    pattern = ""
    for char in reversed(tag):
        pattern = f"(?:{re.escape(char)}{pattern})?"
    return pattern


_AFTER_VALUE = (_PARAMETER, _END, _OUTER_END)
# A value may hold its own end tag: the one that counts is followed by another tag.
_VALUE_END = re.compile(rf"\n?</parameter>(?=\s*(?:{'|'.join(_AFTER_VALUE)}))")
_MAY_BE_VALUE_END = re.compile(
    rf"(?:\n?</parameter>\s*(?:{'|'.join(map(_beginning_of, _AFTER_VALUE))})"
    rf"|\n{_beginning_of('</parameter>')}|<{_beginning_of('/parameter>')})\Z"
)


class XmlCall:
    """Reads one call from `<function=` on. `name` is known with its `>`; `take_arguments` gives JSON of what came.

    Values take the types that the tool's schema gives them; those that are text alone come as they are
    generated, without one newline at either end. `failed` once it cannot be a call.
    """

    def __init__(self, schemas: ToolSchemas, known_only: bool) -> None:
        """`known_only`: a name that is none of the tools' makes no call."""
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._schemas = schemas
        self._known_only = known_only
        self._step: Callable[[str], int] = self._read_function
        self._types: frozenset[str] | None = None
        self._prefix = ""  # what comes ahead of the value under way
        self._value = ""  # of which nothing was shown
        self._in_text = False
        self._arguments = ""  # not taken yet
        self._num_arguments = 0

    def read(self, text: str) -> int:
        """Reads as far as is certain. Returns where what is not yet read, or not of the call, begins."""
        at = 0
        while not (self.done or self.failed):
            taken = self._step(text[at:])
            if not taken:
                break
            at += taken
        return at

    def take_arguments(self) -> str:
        """What came of the arguments since the last time."""
        taken, self._arguments = self._arguments, ""
        return taken

    def closing(self) -> str:
        """What makes valid JSON of all that was taken."""
        if self.done:
            return ""
        return ('"' if self._in_text else "") + ("}" if self._num_arguments else "{}")

    def _read_function(self, text: str) -> int:
        taken = self._tag(text, FUNCTION)
        if taken:
            self._step = self._read_name
        return taken

    def _read_name(self, text: str) -> int:
        taken, name = self._name(text)
        if name and self._known_only and name not in self._schemas.names:
            self.failed = True
        elif name:
            self.name = name
            self._step = self._read_member
        return taken

    def _read_member(self, text: str) -> int:
        taken = self._tag(text, *_AFTER_VALUE)
        if text[:taken].endswith(_PARAMETER):
            self._step = self._read_key
        elif taken:
            self._arguments += self.closing()
            self.done = True
        return 0 if text[:taken].endswith(_OUTER_END) else taken

    def _read_key(self, text: str) -> int:
        taken, key = self._name(text)
        if key:
            assert self.name is not None
            self._types = self._schemas.types(self.name, key)
            self._prefix = (", " if self._num_arguments else "{") + json.dumps(key, ensure_ascii=False) + ": "
            self._step = self._read_first_newline
        return taken

    def _read_first_newline(self, text: str) -> int:
        if text:
            self._step = self._read_value
        return 1 if text.startswith("\n") else self._read_value(text)

    def _read_value(self, text: str) -> int:
        if end := _VALUE_END.search(text):
            self._take(text[: end.start()])
            self._end_value()
            self._step = self._read_member
            return end.end()
        begun = _MAY_BE_VALUE_END.search(text)
        taken = begun.start() if begun else len(text)
        self._take(text[:taken])
        return taken

    def _take(self, text: str) -> None:
        """Takes a piece of the value; shows it where it can only be text."""
        if not text:
            return
        if self._in_text:
            self._arguments += _escaped(text)
            return
        self._value += text
        if self._types == {"string"} or (self._types == {"string", "null"} and not self._may_be_null()):
            self._arguments += f'{self._prefix}"{_escaped(self._value)}'
            self._num_arguments += 1
            self._in_text, self._value = True, ""

    def _may_be_null(self) -> bool:
        return any(null.startswith(self._value) for null in _NULLS)

    def _end_value(self) -> None:
        if self._in_text:
            self._arguments += '"'
            self._in_text = False
            return
        self._arguments += self._prefix + typed_json(self._value, self._types)
        self._num_arguments += 1
        self._value = ""

    def _tag(self, text: str, *tags: str) -> int:
        """Length of the one of `tags` that `text` begins with, white space included; 0 if it may yet come."""
        rest = text.lstrip()
        for tag in tags:
            if rest.startswith(tag):
                return len(text) - len(rest) + len(tag)
        self.failed = not any(tag.startswith(rest) for tag in tags)
        return 0

    def _name(self, text: str) -> tuple[int, str]:
        """Length and text of the name that `>` ends; 0 if it may yet come."""
        end = next((i for i, char in enumerate(text[:_MOST_NAME]) if char in "<>\n"), -1)
        if end >= 0 and text[end] == ">" and text[:end].strip():
            return end + 1, text[:end].strip()
        self.failed = end >= 0 or len(text) >= _MOST_NAME
        return 0, ""


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
