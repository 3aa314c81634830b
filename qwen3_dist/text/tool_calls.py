"""Tells tool calls from the text around them, as it comes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qwen3_dist.text.marks import begun_mark
from qwen3_dist.text.parsed import Parsed, ToolCallDelta
from qwen3_dist.text.tool_calls_json import JsonCall
from qwen3_dist.text.tool_calls_xml import FUNCTION, XmlCall
from qwen3_dist.text.tool_schemas import ToolSchemas

ToolCallForm = Literal["json", "xml"]
_OPENS, _CLOSES = "<tool_call>", "</tool_call>"


def tool_call_form(template_source: str) -> ToolCallForm | None:
    """The form that a chat template teaches: "json" as Qwen3's, "xml" as Qwen3-Coder's; None if it has none."""
    if FUNCTION in template_source:
        return "xml"
    return "json" if _OPENS in template_source else None


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCalls:
    """Reads text with calls in it. How it is split changes nothing of what the parts, joined, are.

    A call is shown from when its name is complete. One that is malformed or cut off before that is content as it
    stands. One that is so later ends there: what was shown of its arguments is closed so that it is valid JSON, and
    what follows is content. White space before and between calls, and at the end after one, is not content.
    """

    def __init__(
        self,
        form: ToolCallForm,
        tools: Sequence[Mapping[str, Any]],
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`tools` in OpenAI's form."""
        self._schemas = ToolSchemas(tools)
        self._new_id = new_id
        self._form = form
        # Qwen3-Coder sometimes leaves the outer tag out.
        self._openings = (_OPENS, FUNCTION) if form == "xml" else (_OPENS,)
        self._step = self._read_content
        self._unread = ""
        self._call: JsonCall | XmlCall | None = None
        self._raw = ""  # of the call under way
        self._begun = False  # whether something of it was shown
        self._num_calls = 0
        self._after_call = False
        self._space = ""  # it is content if content follows, or at the end if no call came before
        self._shown = Parsed()

    def push(self, text: str) -> Parsed:
        """What `text` adds for certain."""
        self._unread += text
        while self._step():
            pass
        return self._take_shown()

    def finish(self) -> Parsed:
        """What was held back, once no more text comes."""
        if self._call is not None:
            if self._call.name:
                self._unread = ""
            self._end_call(self._call)
        if not (self._step == self._read_closing and _CLOSES.startswith(self._unread.strip())):
            self._show(self._unread)
        if not self._after_call:
            self._shown += Parsed(self._space)
        self._unread = self._space = ""
        return self._take_shown()

    def _take_shown(self) -> Parsed:
        shown, self._shown = self._shown, Parsed()
        return shown

    # Each step reads on and says whether the next one may have something to read.

    def _read_content(self) -> bool:
        found = [(self._unread.find(tag), tag) for tag in self._openings if tag in self._unread]
        at, opening = min(found, default=(len(self._unread) - begun_mark(self._unread, self._openings), ""))
        self._show(self._unread[:at])
        self._unread = self._unread[at:]
        if not opening:
            return False
        wrapped = opening == _OPENS
        self._call = JsonCall() if self._form == "json" else XmlCall(self._schemas, known_only=not wrapped)
        self._raw = ""
        self._begun = False
        self._take_raw(len(opening) if wrapped else 0)
        self._step = self._read_call
        return True

    def _read_call(self) -> bool:
        call = self._call
        assert call is not None
        self._take_raw(call.read(self._unread))
        if call.name:
            self._show_call(call.name, call.take_arguments())
        if not (call.done or call.failed):
            return False
        self._end_call(call)
        self._step = self._read_closing if call.done else self._read_content
        return True

    def _read_closing(self) -> bool:
        rest = self._unread.lstrip()
        if _CLOSES.startswith(rest) and rest != _CLOSES:
            return False
        self._unread = rest.removeprefix(_CLOSES)
        self._step = self._read_content
        return True

    def _take_raw(self, length: int) -> None:
        self._raw += self._unread[:length]
        self._unread = self._unread[length:]

    def _end_call(self, call: JsonCall | XmlCall) -> None:
        if call.name:
            self._show_call(call.name, call.closing())
            self._num_calls += 1
            self._after_call = True
        else:
            self._show(self._raw)
        self._call = None

    def _show_call(self, name: str, arguments: str) -> None:
        """A part of the call under way; its first part names it."""
        if not self._begun:
            self._begun = True
            part = ToolCallDelta(self._num_calls, self._new_id(), name, arguments)
        elif arguments:
            part = ToolCallDelta(self._num_calls, arguments=arguments)
        else:
            return
        self._shown += Parsed(tool_calls=(part,))

    def _show(self, text: str) -> None:
        """Shows content; white space at its end waits for what follows it."""
        if self._after_call:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            self._shown += Parsed(self._space + body)
            self._space = ""
            self._after_call = False
        self._space += text[len(body) :]
