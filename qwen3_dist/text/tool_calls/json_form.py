"""Tool calls in Qwen3's JSON form: `{"name": ..., "arguments": {...}}` between the tags."""

from __future__ import annotations

import json
import re

from qwen3_dist.text.tool_calls.block import Block, WrittenCall
from qwen3_dist.text.tool_calls.json_reader import SPACE, JsonReader
from qwen3_dist.text.tool_calls.lenient_json import LenientJson, LenientReader, lenient_json

# What may follow what, outside of the members' keys and values.
_FOLLOWERS = {"": "{", "{": '"}', "key": ":", "value": ",}", ",": '"'}
_ARGUMENTS = ("arguments", "parameters")
_TAG = "tool_call>"
_JSON = "{[\"':"  # what prose after a call does not begin with
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_LABELS = ("name", "id", "type", "index")  # what stands beside arguments; anything else may be some


class JsonCall:
    """Reads one call that is strict JSON. `name` is known with its closing quote; `pop_arguments` gives what came.

    The members' order is free. Arguments may be an object, JSON text of one, null, or absent, and other members are
    ignored where there are arguments. `failed` once it is no such call. What `pop_arguments` gave is valid JSON
    with `remaining_arguments` after it, once the arguments have ended (`has_arguments`). `num_shown` characters of the call
    are what it gave, and what was ahead of that.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self.has_arguments = False
        self._tail = ""
        self.num_shown = 0
        self._num_read = 0
        self._last = ""  # the last punctuation, "key" or "value"
        self._key = ""
        self._reader: JsonReader | None = None
        self._value = ""  # of what is being read
        self._arguments = ""  # not taken yet
        self._streamed: JsonReader | None = None
        self._is_early = False  # whether they come as they are read
        self.others: list[str] = []  # members that may be arguments
        self._function = ""  # the member that OpenAI's clients have around name and arguments

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
                    self._end()
        self._num_read += at
        return at

    @property
    def is_all_but_closed(self) -> bool:
        """Whether name and arguments are whole."""
        return bool(self.name) and self.has_arguments and not self.failed

    def pop_arguments(self) -> str:
        """What came of the arguments since the last time, if they come before the end of the call."""
        if not self._is_early:
            return ""
        taken, self._arguments = self._arguments, ""
        return taken

    def remaining_arguments(self) -> str:
        """What was not yet taken of arguments that have ended."""
        return self._arguments + self._tail

    def _begin_value(self, first: str) -> None:
        self._reader = JsonReader()
        if self._key == "name":
            self.failed = first != '"'
        elif self._is_arguments():
            self.failed = first not in '{"n'
            if first == "{":
                self._streamed, self._is_early = self._reader, self.name is not None

    def _is_arguments(self) -> bool:
        return self._key in _ARGUMENTS and not self.has_arguments

    def _read_value(self, reader: JsonReader, text: str, start: int) -> int:
        at, shown = reader.read(text, start)
        if reader is self._streamed:
            self._arguments += shown
            if shown:
                self.num_shown = self._num_read + reader.shown_end
        else:
            self._value += shown
        self.failed = reader.failed
        if reader.done:
            self._end_value(reader)
        return at

    def _end_value(self, reader: JsonReader) -> None:
        value, self._value, self._reader = self._value + reader.held, "", None
        if self._last != ":":
            self._last, self._key = "key", json.loads(value)
            return
        self._last = "value"
        if self._key == "name" and self.name is None:
            self.name = (_text(value) or "").strip() or None
            self.failed = not self.name
        elif reader is self._streamed:
            self._tail, self.has_arguments = reader.held, True
        elif self._is_arguments():
            if value not in ("null", '""'):
                self._append_text(_text(value))
        elif self._key not in _LABELS:
            self.others.append(f"{json.dumps(self._key)}: {value}")
            self._function = value if self._key == "function" else self._function

    def _append_text(self, text: str | None) -> None:
        """Takes `text` as the arguments if it is an object."""
        stripped = (text or "").strip()
        read = lenient_json(stripped)
        is_whole = stripped[:1] == "{" and not read.is_cut and read.end == len(stripped)
        if is_whole and read.written:
            self._tail, self.has_arguments = read.written, True
        else:
            self.failed = True

    def _end(self) -> None:
        if not self.has_arguments and not self.others:
            self._tail, self.has_arguments = "{}", True
        if self.name is None:
            self._take_function()
        has_none = not self.num_shown and "".join((self._arguments + self._tail).split()) == "{}"
        self.done = self.name is not None and self.has_arguments and not (has_none and self.others)
        self.failed = not self.done

    def _take_function(self) -> None:
        inner = JsonCall()
        if self._function.startswith("{"):
            inner.read(self._function)
        if inner.done:
            self.name, self.has_arguments, self.others = inner.name, True, []
            self._arguments, self._tail = inner.remaining_arguments(), ""


def json_block(text: str) -> Block:
    """Reads `text` as calls: an object, several of them, or a list, as far as they can be meant in one way only.

    A string that holds tags of calls ends at its first quote, lest it take in the calls after it. Prose after the
    last call is content, but where more JSON follows it that is no call, none of the block is.
    """
    repairs_quotes = _TAG not in text
    calls: list[WrittenCall] = []
    at = _skipped(text, 0, "[")
    in_list = "[" in text[:at]
    is_closed, is_cut = True, False
    while text[at : at + 1] == "{" and not is_cut:
        read = lenient_json(text, at, repairs_quotes)
        is_closed, is_cut = read.is_closed, read.is_cut
        end = _skipped(text, read.end, "}],;")
        call = _written_call(read, "}" in text[read.end : end])
        if call is None or not (is_closed or any(f'"{key}"' in (read.written or "") for key in _ARGUMENTS)):
            break
        calls.append(call)
        in_list = in_list and "]" not in text[read.end : end]
        at = end
    if calls and not is_cut and at < len(text) and (in_list or text[at] in _JSON):
        return Block()
    return Block(tuple(calls), text[at:], is_cut, is_closed)


def ends_in_string(text: str) -> bool:
    """Whether a tag that follows `text`, the begin of a block in JSON, is text of a string there.

    Where `text` can be no JSON, the tag is none of a string only after a bracket with as many quotes as pairs have.
    """
    if text.endswith(('"', "'")):
        text += "<"  # a quote right before the tag is text as well
    at = _skipped(text, 0, "[")
    while text[at : at + 1] == "{":
        reader = LenientReader()
        at, _ = reader.read(text, at)
        if reader.failed:
            is_even = _ESCAPED.sub("", text).count('"') % 2 == 0
            return not (is_even and text.rstrip().endswith(("}", "]")))
        reader.finish()
        if reader.cut_string:
            return True
        at = _skipped(text, at, "}],;")
    return False


def _skipped(text: str, at: int, needless: str) -> int:
    while at < len(text) and text[at] in SPACE + needless:
        at += 1
    return at


def _written_call(read: LenientJson, closed_early: bool) -> WrittenCall | None:
    """The call that is JSON `read`. If it was closed too early, what stands after its arguments is some of them.

    It is no call if a mixed up bracket leaves open whether they are.
    """
    call = JsonCall()
    call.read(read.written or "")
    if not (call.done and call.name) or (read.is_mixed and call.others and not closed_early):
        return None
    arguments = call.remaining_arguments()
    if closed_early and call.others:
        arguments = f"{arguments.rstrip()[:-1]}, {', '.join(call.others)}}}"
    return WrittenCall(call.name, arguments)


def is_json(text: str) -> bool:
    """Whether a client could take `text` for the arguments of a call."""
    try:
        json.loads(text, parse_int=len)
    except (ValueError, RecursionError):
        return False
    return True


def _text(value: str) -> str | None:
    """The text that the JSON string `value` is; None if it has no UTF-8 form."""
    text: str = json.loads(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
