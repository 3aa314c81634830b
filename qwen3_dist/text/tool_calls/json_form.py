"""Tool calls in Qwen3's JSON format: `{"name": ..., "arguments": {...}}` between `<tool_call>` tags."""

from __future__ import annotations

import json
import re

from qwen3_dist.text.tool_calls.block import Block, WrittenCall
from qwen3_dist.text.tool_calls.json_reader import SPACE, JsonReader
from qwen3_dist.text.tool_calls.lenient_json import LenientJson, LenientReader, lenient_json

# Which punctuation may follow which, outside of the members' keys and values.
_FOLLOWERS = {"": "{", "{": '"}', "key": ":", "value": ",}", ",": '"'}
_ARGUMENT_KEYS = ("arguments", "parameters")
_TAG = "tool_call>"
_JSON_STARTS = "{[\"':"  # prose after a call does not begin with one of these
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_METADATA_KEYS = ("name", "id", "type", "index")  # members under other keys may be arguments


class JsonCall:
    """Incrementally parses one call in strict JSON.

    Members may come in any order. Arguments may be an object, a string with the JSON of one, null, or absent; other
    members are ignored if there are arguments. `name` is known at its closing quote. `failed`: the text is not such a
    call. The results of `pop_arguments`, followed by `remaining_arguments` once `has_arguments`, are valid JSON.
    `num_shown` is the number of characters of the call up to the end of what `pop_arguments` returned.
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
        self._value = ""  # the value or key under way
        self._arguments = ""  # not popped yet
        self._streamed: JsonReader | None = None
        self._is_streaming = False  # whether arguments are popped as they arrive
        self.others: list[str] = []  # members that may be arguments
        self._function = ""  # the value of `function`, which OpenAI's format wraps around name and arguments

    def read(self, text: str) -> int:
        """Parses up to the end of the call. Returns the index of the first character after it."""
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
        """Whether name and arguments are complete."""
        return bool(self.name) and self.has_arguments and not self.failed

    def pop_arguments(self) -> str:
        """Returns the arguments since the last call of this method, "" if they must wait for the call's end."""
        if not self._is_streaming:
            return ""
        new, self._arguments = self._arguments, ""
        return new

    def remaining_arguments(self) -> str:
        """Returns the arguments that `pop_arguments` has not returned, once they are complete."""
        return self._arguments + self._tail

    def _begin_value(self, first: str) -> None:
        self._reader = JsonReader()
        if self._key == "name":
            self.failed = first != '"'
        elif self._is_arguments():
            self.failed = first not in '{"n'
            if first == "{":
                self._streamed, self._is_streaming = self._reader, self.name is not None

    def _is_arguments(self) -> bool:
        return self._key in _ARGUMENT_KEYS and not self.has_arguments

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
                self._set_arguments(_text(value))
        elif self._key not in _METADATA_KEYS:
            self.others.append(f"{json.dumps(self._key)}: {value}")
            self._function = value if self._key == "function" else self._function

    def _set_arguments(self, text: str | None) -> None:
        """Sets the arguments to `text`, or fails if it is not a JSON object."""
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
            self._read_function()
        has_none = not self.num_shown and "".join((self._arguments + self._tail).split()) == "{}"
        self.done = self.name is not None and self.has_arguments and not (has_none and self.others)
        self.failed = not self.done

    def _read_function(self) -> None:
        """Reads name and arguments from the member `function`."""
        inner = JsonCall()
        if self._function.startswith("{"):
            inner.read(self._function)
        if inner.done:
            self.name, self.has_arguments, self.others = inner.name, True, []
            self._arguments, self._tail = inner.remaining_arguments(), ""


def json_block(text: str) -> Block:
    """Parses `text` as calls: one object, several, or a list, repaired where only one meaning is possible.

    If the text has tags of calls, strings end at their first quote, so that they do not swallow the calls after them.
    Prose after the last call is content. If JSON follows that is not a call, nothing in the block is a call.
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
        if call is None or not (
            is_closed or any(f'"{key}"' in (read.written or "") for key in _ARGUMENT_KEYS)
        ):
            break
        calls.append(call)
        in_list = in_list and "]" not in text[read.end : end]
        at = end
    if calls and not is_cut and at < len(text) and (in_list or text[at] in _JSON_STARTS):
        return Block()
    return Block(tuple(calls), text[at:], is_cut, is_closed)


def ends_in_string(text: str) -> bool:
    """Whether `text`, the start of a JSON block, ends inside a string, so that a tag after it is part of the string.

    If `text` is not JSON, it ends outside of strings only after a closing bracket and an even number of quotes.
    """
    if text.endswith(('"', "'")):
        text += "<"  # a quote right before the tag is part of the string too
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
    """Returns the index after white space and characters of `needless`."""
    while at < len(text) and text[at] in SPACE + needless:
        at += 1
    return at


def _written_call(read: LenientJson, closed_early: bool) -> WrittenCall | None:
    """Returns the call in `read`, or None.

    If a surplus bracket shows that the arguments were closed too early, the members after them belong to them. It is
    not a call if a mismatched bracket leaves that open.
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
    """Whether `text` is valid JSON."""
    try:
        json.loads(text, parse_int=len)
    except (ValueError, RecursionError):
        return False
    return True


def _text(value: str) -> str | None:
    """Returns the text of the JSON string `value`, None if it has a lone surrogate."""
    text: str = json.loads(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
