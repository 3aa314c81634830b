"""Tool calls in Qwen3-Coder's XML form: `<function=NAME>`, a `<parameter=KEY>` for each argument, `</function>`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from qwen3_dist.text.tool_calls.tags import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END, TOOL_CALL_END
from qwen3_dist.text.tool_schemas import ToolSchemas, typed_json

_MOST_NAME = 256  # characters; what is longer is no name
_NULLS = ("null", "None")  # as JSON and as Python write it, which the models' template does
# As models may misspell them too. The line break before a tag is the tag's.
_TAG = re.compile(
    r"<[ \t]*(?:(?:parameter|function)[ \t]*=|/[ \t]*(?:parameter|function)[ \t]*[>\n<])|</?tool_call>"
)
_BEGUN_TAG = re.compile(r"\n?(?:<[ \t]*/?[ \t]*[a-z_]{0,9}[ \t]*)?\Z")


class XmlCall:
    """Reads one call from `<function=` on, as the template teaches it: every tag is closed, and values hold none
    that could be a tag of the call.

    `name` is known with its `>`; `pop_arguments` gives JSON of what came of the arguments. Values take the types
    that the tool's schema gives them; those that are text alone come as they are generated, without one newline at
    either end. `failed` once it is no such call.
    """

    def __init__(self, schemas: ToolSchemas, is_bare: bool) -> None:
        """`is_bare`: no `<tool_call>` stands around it. Then a name that is none of the tools' makes no call."""
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._schemas = schemas
        self._is_bare = is_bare
        self._step: Callable[[str], int] = self._read_function
        self._key = ""
        self._keys: set[str] = set()
        self._value = ""  # of which nothing was shown
        self._in_text = False
        self._written = Arguments(schemas)
        self._early = ""  # of the arguments, what is certain before it is known whether the call ends

    def read(self, text: str) -> int:
        """Reads as far as is certain. Returns where what is not yet read, or not of the call, begins."""
        at = 0
        while not (self.done or self.failed):
            taken = self._step(text[at:])
            if not taken:
                break
            at += taken
        return at

    def pop_arguments(self) -> str:
        """What came of the arguments since the last time, but for the last value's end."""
        early, self._early = self._early, ""
        return early if self.done else early + self._written.take()

    def remaining_arguments(self) -> str:
        """What was not yet taken of a call that has ended."""
        return self._written.take()

    def _read_function(self, text: str) -> int:
        taken = self._tag(text, FUNCTION)
        if taken:
            self._step = self._read_name
        return taken

    def _read_name(self, text: str) -> int:
        taken, name = self._name(text)
        if name and not (name in self._schemas.names if self._is_bare else is_name(name)):
            self.failed = True
        elif name:
            self.name = self._written.name = name
            self._step = self._read_member
        return taken

    def _read_member(self, text: str) -> int:
        taken = self._tag(text, PARAMETER, FUNCTION_END)
        if text[:taken].endswith(PARAMETER):
            self._step = self._read_key
        elif taken:
            self._written.end()
            self.done = True
        return taken

    def _read_key(self, text: str) -> int:
        taken, self._key = self._name(text)
        self.failed = self.failed or self._key in self._keys
        if taken:
            self._keys.add(self._key)
            self._step = self._read_first_newline
        return taken

    def _read_first_newline(self, text: str) -> int:
        if text:
            self._step = self._read_value
        return 1 if text.startswith("\n") else self._read_value(text)

    def _read_value(self, text: str) -> int:
        tag = _TAG.search(text)
        begun = tag or _BEGUN_TAG.search(text)
        assert begun is not None
        end = begun.start() - (tag is not None and text[: begun.start()].endswith("\n"))
        if end or tag is None:
            self._take(text[:end])
            return end
        ends = tag[0] == PARAMETER_END and self._may_follow(text[tag.end() :])
        if ends:
            self._early += self._written.take()
            self._end_value()
            self._step = self._read_member
            return tag.end()
        self.failed = ends is False
        return 0

    def _may_follow(self, text: str) -> bool | None:
        """Whether `text` after `</parameter>` shows that the tag ends a value; None if it may yet."""
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

    def _take(self, text: str) -> None:
        """Takes a piece of the value; shows it where it can only be text."""
        if not text:
            return
        if self._in_text:
            self._written.extend_text(text)
            return
        self._value += text
        types = self._written.types(self._key)
        if types == {"string"} or (types == {"string", "null"} and not self._may_be_null()):
            self._written.begin_text(self._key, self._value)
            self._in_text, self._value = True, ""

    def _may_be_null(self) -> bool:
        return any(null.startswith(self._value.strip()) for null in _NULLS)

    def _end_value(self) -> None:
        if self._in_text:
            self._written.end_text()
        else:
            self._written.add(self._key, self._value)
        self._in_text, self._value = False, ""

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
        length, name = _name(text)
        self.failed = length < 0
        return max(length, 0), name


class Arguments:
    """JSON of a call's arguments as they come; `name` is the tool's."""

    def __init__(self, schemas: ToolSchemas, name: str = "") -> None:
        self.name = name
        self._schemas = schemas
        self._num = 0
        self._json = ""  # not taken yet

    def take(self) -> str:
        taken, self._json = self._json, ""
        return taken

    def types(self, key: str) -> frozenset[str] | None:
        return self._schemas.types(self.name, key)

    def add(self, key: str, value: str) -> None:
        """Adds an argument as JSON of its type."""
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
    """Length and text of the name that `>` ends; 0 if it may yet come, -1 if there is none."""
    end = next((i for i, char in enumerate(text[:_MOST_NAME]) if char in "<>\n"), -1)
    if end >= 0 and text[end] == ">" and text[:end].strip():
        return end + 1, text[:end].strip()
    return (-1 if end >= 0 or len(text) >= _MOST_NAME else 0), ""


def is_name(text: str) -> bool:
    """Whether a tool may have that name."""
    return bool(text) and not any(char.isspace() or char in "<>{}=\"'" for char in text)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
