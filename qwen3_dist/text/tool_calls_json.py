"""A tool call in Qwen3's JSON form: `{"name": ..., "arguments": {...}}` between the tags."""

from __future__ import annotations

import json

from qwen3_dist.text.json_reader import SPACE, JsonReader

# What may follow what, outside of the members' keys and values.
_FOLLOWERS = {"": "{", "{": '"}', "key": ":", "value": ",}", ",": '"'}


class JsonCall:
    """Reads one call. `name` is known with its closing quote; `take_arguments` gives what came of the arguments.

    Their order is free. Arguments may be an object, JSON text of one, null, or absent, and other members are
    ignored. `failed` once it cannot be a call: no JSON, no name, or arguments of another kind.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._last = ""  # the last punctuation, "key" or "value"
        self._key = ""
        self._reader: JsonReader | None = None
        self._value = ""  # of what is being read
        self._arguments = ""  # not taken yet
        self._streamed: JsonReader | None = None
        self._has_arguments = False

    def read(self, text: str) -> int:
        """Reads as far as the call goes. Returns where the first character lies that is not its own."""
        at = 0
        while at < len(text) and not (self.done or self.failed):
            if self._reader is not None:
                at = self._read_value(self._reader, text, at)
            elif text[at] in SPACE:
                at += 1
            elif self._last == ":":
                self._begin_value(text[at])
            elif text[at] not in _FOLLOWERS[self._last]:
                self.failed = True
            elif text[at] == '"':
                self._reader = JsonReader()
            else:
                self._last = text[at]
                at += 1
                if self._last == "}":
                    self.done, self.failed = self.name is not None, self.name is None
        return at

    def take_arguments(self) -> str:
        """What came of the arguments since the last time."""
        taken, self._arguments = self._arguments, ""
        return taken

    def closing(self) -> str:
        """What makes valid JSON of all that was taken."""
        if not self._has_arguments:
            return "{}"
        return self._streamed.closing() if self._streamed is not None else ""

    def _begin_value(self, first: str) -> None:
        self._reader = JsonReader()
        if self._key == "name":
            self.failed = first != '"'
        elif self._key == "arguments" and not self._has_arguments:
            self.failed = first not in '{"n'
            if first == "{":
                self._streamed, self._has_arguments = self._reader, True

    def _read_value(self, reader: JsonReader, text: str, start: int) -> int:
        at, shown = reader.read(text, start)
        if reader is self._streamed:
            self._arguments += shown
        else:
            self._value += shown
        self.failed = reader.failed
        if reader.done:
            self._end_value()
        return at

    def _end_value(self) -> None:
        value, self._value, self._reader = self._value, "", None
        if self._last != ":":
            self._last, self._key = "key", json.loads(value)
            return
        self._last = "value"
        if self._key == "name" and self.name is None:
            self.name = _text(value)
            self.failed = not self.name
        elif self._key == "arguments" and not self._has_arguments and value not in ("null", '""'):
            self._take_text(_text(value))

    def _take_text(self, text: str | None) -> None:
        """Takes `text` as the arguments if it is an object."""
        reader = JsonReader()
        stripped = (text or "").strip()
        end, shown = reader.read(stripped, 0)
        self.failed = not (stripped.startswith("{") and reader.done and end == len(stripped))
        if not self.failed:
            self._arguments, self._has_arguments = shown, True


def _text(value: str) -> str | None:
    """The text that the JSON string `value` is; None if it has no UTF-8 form."""
    text: str = json.loads(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
