"""Incrementally splits tool calls from the content around them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3_dist.text.parsed import Parsed, ToolCallDelta
from qwen3_dist.text.partial_match import partial_match
from qwen3_dist.text.tool_calls import tags
from qwen3_dist.text.tool_calls.block import Block
from qwen3_dist.text.tool_calls.json_form import JsonCall, ends_in_string, is_json, json_block
from qwen3_dist.text.tool_calls.lenient_xml import xml_block
from qwen3_dist.text.tool_calls.tags import FUNCTION, TOOL_CALL, TOOL_CALL_END, ToolCallForm
from qwen3_dist.text.tool_calls.xml_form import XmlCall
from qwen3_dist.text.tool_schemas import ToolSchemas

_MAX_ENDS = 8  # possible ends of one block at which it is parsed


def new_call_id() -> str:
    """Returns a unique id for a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCalls:
    """Splits text into content and tool calls. The joined results do not depend on how it was split into pushes.

    Calls in the template's strict format are streamed, from the first value on. A block that deviates from it is
    parsed again as a whole once its end is known, and repaired if only one meaning is possible; otherwise it is
    content. If a part of the arguments was already streamed, the rest then follows unchanged, so that clients see
    invalid JSON. A call that the token limit cuts off stays incomplete too. White space before, between and after
    calls is not content.
    """

    def __init__(
        self,
        form: ToolCallForm,
        tools: Sequence[Mapping[str, Any]] | ToolSchemas,
        new_id: Callable[[], str] = new_call_id,
        only_calls: bool = False,
    ) -> None:
        """`tools` are in OpenAI's format. `only_calls`: the text is all calls, so a call cut off is not content."""
        self._schemas = tools if isinstance(tools, ToolSchemas) else ToolSchemas(tools)
        self._new_id = new_id
        self._form = form
        self._only_calls = only_calls
        # Qwen3-Coder sometimes omits the outer tag.
        self.openings = (TOOL_CALL, FUNCTION) if form == "xml" else (TOOL_CALL,)
        self._step = self._read_content
        self._unread = ""
        self._opening = ""  # the opening tag of the block under way, "" if omitted
        self._call: JsonCall | XmlCall = JsonCall()
        self._consumed: list[str] = []  # text of the block that `_call` has parsed
        self._arguments: list[str] = []  # output so far for the call under way
        self._begun = False  # whether there was output for the call under way
        self._awaiting: tuple[Block | None, int, int] = (None, 0, 0)  # arguments of `_await_end`
        self._ends: list[
            tuple[int, int]
        ] = []  # possible ends of the block, and where the text after them begins
        self._num_searched = 0  # characters of the block already searched for its end
        self._num_inner = 0  # tags inside the block's strings
        self._depth = 0  # nesting of calls inside the block
        self._num_calls = 0
        self._after_call = False
        self._space = ""  # white space, content if more content follows or if no call preceded it
        self._shown = Parsed()

    def push(self, text: str) -> Parsed:
        """Adds `text`. Returns what is certain so far."""
        self._unread += text
        self._read_on()
        return self._pop_shown()

    def finish(self, cut: bool = False) -> Parsed:
        """Returns what was held back, at the end of the text. `cut`: the token limit ended it."""
        self._read_on()
        while self._step in (self._read_call, self._read_block, self._read_after_xml):
            self._finish_block(cut)
            self._read_on()
        if self._step != self._read_closing or not tags.begins_closing_tag(self._unread.strip()):
            self._show(self._unread)
        if not self._after_call:
            self._shown += Parsed(self._space)
        self._unread = self._space = ""
        return self._pop_shown()

    def _read_on(self) -> None:
        while self._step():
            pass

    def _pop_shown(self) -> Parsed:
        shown, self._shown = self._shown, Parsed()
        return shown

    # Each step parses some text. It returns whether the next step may be able to continue.

    def _read_content(self) -> bool:
        found = [(self._unread.find(tag), tag) for tag in self.openings if tag in self._unread]
        at, opening = min(found, default=(len(self._unread) - partial_match(self._unread, self.openings), ""))
        self._show(self._unread[:at])
        self._unread = self._unread[at:]
        if not opening:
            return False
        # A function without the outer tag is a call only if a tool has its name.
        opening = opening if opening == TOOL_CALL else ""
        self._unread = self._unread.removeprefix(opening)
        self._begin_block(opening)
        return True

    def _begin_block(self, opening: str) -> None:
        self._opening = opening
        self._call = JsonCall() if self._form == "json" else XmlCall(self._schemas, not self._opening)
        self._consumed, self._arguments = [], []
        self._ends, self._num_searched = [], 0
        self._num_inner = self._depth = 0
        self._step = self._read_call

    def _read_call(self) -> bool:
        """Parses a call in the template's strict format, and outputs what is certain of it."""
        call = self._call
        is_xml = isinstance(call, XmlCall)
        mark = None if is_xml else re.search(f"{TOOL_CALL}|{TOOL_CALL_END}", self._unread)
        if not call.done:
            certain = (
                mark.start()
                if mark
                else len(self._unread) - partial_match(self._unread, (TOOL_CALL, TOOL_CALL_END))
            )
            length = call.read(self._unread[:certain])
            self._consumed.append(self._unread[:length])
            self._unread = self._unread[length:]
            if call.name and (arguments := call.pop_arguments()):
                self._show_call(call.name, arguments)
        rest = self._unread.lstrip()
        closing = TOOL_CALL_END if self._opening else ""
        if call.done and rest.startswith(closing):
            if is_xml:
                self._await_end(None, 0, len(self._unread) - len(rest) + len(closing))
            else:
                self._end_call()
        elif self._opening and rest.startswith(TOOL_CALL) and not "".join(self._consumed).strip():
            # A repeated opening tag opens one block.
            opening, _, self._unread = self._unread.partition(TOOL_CALL)
            self._begin_block("".join((self._opening, *self._consumed, opening, TOOL_CALL)))
        elif not self._opening and call.name is None and (call.failed or mark):
            self._show("".join(self._consumed))
            self._step = self._read_content
        elif call.failed or mark or (call.done and not TOOL_CALL_END.startswith(rest)):
            self._unread = "".join(self._consumed) + self._unread
            self._step = self._read_block
        else:
            return False
        return True

    def _read_block(self) -> bool:
        """Parses a block that deviates from the strict format, at the first tag that can be its end."""
        marks = (TOOL_CALL, TOOL_CALL_END) if self._opening else (TOOL_CALL, TOOL_CALL_END, tags.FUNCTION_END)
        for mark in re.compile("|".join(marks)).finditer(self._unread, self._num_searched):
            end = mark.end() if mark[0] == tags.FUNCTION_END else mark.start()
            is_within = self._is_within(mark[0])
            is_inner = is_within and self._is_in_string(mark)
            self._num_searched = mark.end()
            if is_inner and not 1 < self._num_inner <= _MAX_ENDS:
                continue
            if is_within and len(self._ends) == _MAX_ENDS - 1:
                continue  # the last attempt is at the end of the calls in the value
            block = self._block(self._unread[:end])
            if is_inner and (block.is_cut or not block.calls):
                continue
            self._ends.append((end, mark.start() if mark[0] == TOOL_CALL else mark.end()))
            if not block.is_cut and (block.calls or len(self._ends) == 1):
                if block.calls and self._is_xml():
                    self._await_end(block, *self._ends.pop())
                else:
                    self._end_block(block, *self._ends[-1])
                return True
            if not block.is_cut or len(self._ends) == _MAX_ENDS:
                self._end_at_first(mark.end())
                return True
        self._num_searched = max(self._num_searched, len(self._unread) - len(TOOL_CALL_END))
        return False

    def _is_within(self, tag: str) -> bool:
        """Whether `tag`, the block's next one, opens or closes a call nested in the block."""
        self._depth += {TOOL_CALL: 1, TOOL_CALL_END: -1}.get(tag, 0)
        return bool(self._opening) and (self._depth > 0 or (tag == TOOL_CALL_END and self._depth == 0))

    def _is_in_string(self, tag: re.Match[str]) -> bool:
        """Whether the nested `tag` is part of a JSON string, so that a call there is not one of the model's.

        Quotes in that string may be unescaped, so only the nesting of tags shows where it ends.
        """
        if self._ends or not (self._num_inner or ends_in_string(self._unread[: tag.start()])):
            return False
        self._num_inner += 1
        return True

    def _await_end(self, block: Block | None, end: int, resume: int) -> None:
        """Waits for the text after an XML call: `block` up to `end`, or `_call` if None; `resume` is after it."""
        self._awaiting = (block, end, resume)
        self._num_searched = resume
        self._step = self._read_after_xml

    def _read_after_xml(self) -> bool:
        after = tags.AFTER_XML.search(self._unread, self._num_searched)
        if after is None:
            self._num_searched = max(self._num_searched, len(self._unread) - tags.MAX_AFTER_XML)
        elif after["inside"] is None:
            self._end_read()
        else:
            block, _, resume = self._awaiting
            self._num_searched = resume + len(TOOL_CALL) * self._unread.startswith(TOOL_CALL, resume)
            self._step = self._read_block
            if block is None:
                consumed = "".join(self._consumed)
                self._unread, self._depth = consumed + self._unread, -1
                self._num_searched += len(consumed)
        return after is not None

    def _end_read(self) -> None:
        block, end, resume = self._awaiting
        if block is None:
            self._end_call()
        else:
            self._end_block(block, end, resume)

    def _read_closing(self) -> bool:
        self._unread = self._unread.lstrip()
        if closing := tags.CLOSING.match(self._unread):
            self._unread = self._unread[closing.end() :]
            return True
        if tags.begins_closing_tag(self._unread):
            return False
        self._step = self._read_content
        return True

    def _end_at_first(self, until: int) -> None:
        """Ends the block at its first possible end, or later if it continues there, at most at `until`."""
        end, resume = self._ends[0]
        continues_to = tags.rest_of_xml(self._unread, resume, until) if self._is_xml() else None
        if continues_to is None:
            self._end_block(self._block(self._unread[:end]), end, resume)
        else:
            self._end_block(Block(), continues_to, continues_to)

    def _finish_block(self, cut: bool) -> None:
        """Ends the block under way at the end of the text, or at its first possible end."""
        call = self._call
        if self._step == self._read_after_xml:
            self._end_read()
            return
        if self._step == self._read_call:
            if isinstance(call, JsonCall) and (call.done or (cut and call.is_all_but_closed)):
                self._end_call()
                self._unread = ""
                return
            self._unread = "".join(self._consumed) + self._unread
        text = self._unread[: len(self._unread) - partial_match(self._unread, tags.CLOSING_AT_THE_END)]
        block = self._block(text)
        is_whole = bool(block.calls) and not block.is_cut and (block.is_closed or not cut)
        if self._ends and not is_whole:
            self._end_at_first(len(self._unread))
        elif is_whole or not cut:
            self._end_block(block, len(text), len(self._unread))
        else:
            self._cut_block()

    def _cut_block(self) -> None:
        """Ends a block that the token limit cut off; the output so far stands."""
        if self._begun:
            self._leave_call()
        else:
            self._show("" if self._only_calls else self._opening + self._unread)
            self._step = self._read_content
        self._unread = ""

    def _block(self, text: str) -> Block:
        """Parses `text` in its format. In another format than the template's, only known tools are calls."""
        if self._is_xml():
            known_only = self._form == "json" or not self._opening
            return xml_block(text, self._schemas, self._schemas.names if known_only else None)
        block = json_block(text)
        known = self._form == "json" or all(call.name in self._schemas.names for call in block.calls)
        return block if known else Block(rest=text)

    def _is_xml(self) -> bool:
        """Whether the block under way is in the XML format."""
        return self._unread.lstrip().startswith("<")

    def _end_call(self) -> None:
        """Ends a call in the template's strict format, up to its closing tags."""
        assert self._call.name is not None
        self._show_call(self._call.name, self._call.remaining_arguments())
        self._leave_call()

    def _end_block(self, block: Block, end: int, resume: int) -> None:
        """Outputs the block, which is the unread text up to `end`; the text from `resume` on follows it."""
        text, until, after = self._unread[:end], self._unread[:resume], self._unread[resume:]
        calls = list(block.calls)
        if self._begun:
            shown = "".join(self._arguments)
            assert self._call.name is not None
            if calls and calls[0].arguments.startswith(shown):
                self._show_call(self._call.name, calls.pop(0).arguments[len(shown) :])
            else:
                calls, block = [], Block()
                if isinstance(self._call, JsonCall):
                    rest = text[self._call.num_shown :].rstrip()
                    self._show_call(self._call.name, rest[:-1] if is_json(shown + rest) else rest)
            self._leave_call()
        elif not calls:
            self._show(self._opening + until)
            self._unread = after
            self._step = self._read_content
            return
        for call in calls:
            self._show_call(call.name, call.arguments)
            self._leave_call()
        self._unread = block.rest.rstrip() + after

    def _leave_call(self) -> None:
        self._begun, self._arguments = False, []
        self._num_calls += 1
        self._after_call = True
        self._step = self._read_closing

    def _show_call(self, name: str, arguments: str) -> None:
        """Outputs a part of the call under way; the first part has its id and name."""
        if not self._begun:
            self._begun = True
            self._shown += Parsed(tool_calls=(ToolCallDelta(self._num_calls, self._new_id(), name),))
        if arguments:
            self._arguments.append(arguments)
            self._shown += Parsed(tool_calls=(ToolCallDelta(self._num_calls, arguments=arguments),))

    def _show(self, text: str) -> None:
        """Outputs content; white space at its end is held back until more text decides."""
        if self._after_call:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            self._shown += Parsed(self._space + body)
            self._space = ""
            self._after_call = False
        self._space += text[len(body) :]
