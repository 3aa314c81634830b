"""Tells tool calls from the text around them, as it comes."""

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

_MOST_ENDS = 8  # tags of one block at which it is tried as a whole


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCalls:
    """Reads text with calls in it. How it is split changes nothing of what the parts, joined, are.

    A call is shown with all its arguments, or its block is content as it stands. Calls in the template's own form are
    shown while they come, from the first value on. Where a block leaves that form it is read again once its end is
    known, and what can be meant in one way only is mended. If that is impossible after a part of the arguments was
    shown, the rest of them follows as it was written, so that the client sees that they are no JSON. So does a call
    that the token limit cuts off. White space before and between calls, and at the end after one, is not content.
    """

    def __init__(
        self,
        form: ToolCallForm,
        tools: Sequence[Mapping[str, Any]] | ToolSchemas,
        new_id: Callable[[], str] = new_call_id,
        only_calls: bool = False,
    ) -> None:
        """`tools` in OpenAI's form. `only_calls`: all text is calls, so that one cut off early is no content."""
        self._schemas = tools if isinstance(tools, ToolSchemas) else ToolSchemas(tools)
        self._new_id = new_id
        self._form = form
        self._only_calls = only_calls
        # Qwen3-Coder sometimes leaves the outer tag out.
        self.openings = (TOOL_CALL, FUNCTION) if form == "xml" else (TOOL_CALL,)
        self._step = self._read_content
        self._unread = ""
        self._opening = ""  # of the block under way
        self._call: JsonCall | XmlCall = JsonCall()
        self._taken: list[str] = []  # what the call under way took of its block
        self._arguments: list[str] = []  # shown of it
        self._begun = False  # whether something of it was shown
        self._is_read: tuple[Block | None, int, int] = (None, 0, 0)  # it ends there, unless it goes on
        self._ends: list[tuple[int, int]] = []  # where the block may end, and the text goes on
        self._num_searched = 0  # characters of the block, for its end
        self._num_inner = 0  # tags of the block that are text of its strings
        self._depth = 0  # calls that are open inside of the block
        self._num_calls = 0
        self._after_call = False
        self._space = ""  # it is content if content follows, or at the end if no call came before
        self._shown = Parsed()

    def push(self, text: str) -> Parsed:
        """What `text` adds for certain."""
        self._unread += text
        self._read_on()
        return self._take_shown()

    def finish(self, cut: bool = False) -> Parsed:
        """What was held back, once no more text comes; `cut` if that is because of the token limit."""
        self._read_on()
        while self._step in (self._read_call, self._read_block, self._read_after_xml):
            self._finish_block(cut)
            self._read_on()
        if self._step != self._read_closing or not tags.begins_closing_tag(self._unread.strip()):
            self._show(self._unread)
        if not self._after_call:
            self._shown += Parsed(self._space)
        self._unread = self._space = ""
        return self._take_shown()

    def _read_on(self) -> None:
        while self._step():
            pass

    def _take_shown(self) -> Parsed:
        shown, self._shown = self._shown, Parsed()
        return shown

    # Each step reads on and says whether the next one may have something to read.

    def _read_content(self) -> bool:
        found = [(self._unread.find(tag), tag) for tag in self.openings if tag in self._unread]
        at, opening = min(found, default=(len(self._unread) - partial_match(self._unread, self.openings), ""))
        self._show(self._unread[:at])
        self._unread = self._unread[at:]
        if not opening:
            return False
        # A function without the outer tag is a call if there is one of that name.
        opening = opening if opening == TOOL_CALL else ""
        self._unread = self._unread.removeprefix(opening)
        self._begin_block(opening)
        return True

    def _begin_block(self, opening: str) -> None:
        self._opening = opening
        self._call = JsonCall() if self._form == "json" else XmlCall(self._schemas, not self._opening)
        self._taken, self._arguments = [], []
        self._ends, self._num_searched = [], 0
        self._num_inner = self._depth = 0
        self._step = self._read_call

    def _read_call(self) -> bool:
        """Reads a call in the template's own form, and shows it as far as it is certain."""
        call = self._call
        is_xml = isinstance(call, XmlCall)
        mark = None if is_xml else re.search(f"{TOOL_CALL}|{TOOL_CALL_END}", self._unread)
        if not call.done:
            certain = (
                mark.start()
                if mark
                else len(self._unread) - partial_match(self._unread, (TOOL_CALL, TOOL_CALL_END))
            )
            taken = call.read(self._unread[:certain])
            self._taken.append(self._unread[:taken])
            self._unread = self._unread[taken:]
            if call.name and (arguments := call.pop_arguments()):
                self._show_call(call.name, arguments)
        rest = self._unread.lstrip()
        closing = TOOL_CALL_END if self._opening else ""
        if call.done and rest.startswith(closing):
            if is_xml:
                self._await_end(None, 0, len(self._unread) - len(rest) + len(closing))
            else:
                self._end_call()
        elif self._opening and rest.startswith(TOOL_CALL) and not "".join(self._taken).strip():
            # A doubled tag opens one block.
            opening, _, self._unread = self._unread.partition(TOOL_CALL)
            self._begin_block("".join((self._opening, *self._taken, opening, TOOL_CALL)))
        elif not self._opening and call.name is None and (call.failed or mark):
            self._show("".join(self._taken))
            self._step = self._read_content
        elif call.failed or mark or (call.done and not TOOL_CALL_END.startswith(rest)):
            self._unread = "".join(self._taken) + self._unread
            self._step = self._read_block
        else:
            return False
        return True

    def _read_block(self) -> bool:
        """Reads a block in another form, at the first tag that can be its end."""
        marks = (TOOL_CALL, TOOL_CALL_END) if self._opening else (TOOL_CALL, TOOL_CALL_END, tags.FUNCTION_END)
        for mark in re.compile("|".join(marks)).finditer(self._unread, self._num_searched):
            end = mark.end() if mark[0] == tags.FUNCTION_END else mark.start()
            is_within = self._is_within(mark[0])
            is_inner = is_within and self._is_in_string(mark)
            self._num_searched = mark.end()
            if is_inner and not 1 < self._num_inner <= _MOST_ENDS:
                continue
            if is_within and len(self._ends) == _MOST_ENDS - 1:
                continue  # the last try is at the end of the calls in the value
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
            if not block.is_cut or len(self._ends) == _MOST_ENDS:
                self._end_at_first(mark.end())
                return True
        self._num_searched = max(self._num_searched, len(self._unread) - len(TOOL_CALL_END))
        return False

    def _is_within(self, tag: str) -> bool:
        """Whether `tag`, the block's next one, opens or closes a call inside of the block."""
        self._depth += {TOOL_CALL: 1, TOOL_CALL_END: -1}.get(tag, 0)
        return bool(self._opening) and (self._depth > 0 or (tag == TOOL_CALL_END and self._depth == 0))

    def _is_in_string(self, tag: re.Match[str]) -> bool:
        """Whether `tag` of a call inside of the block is text of a JSON string. No call there is the model's.

        Quotes in such text may not be escaped, so only the calls' own tags tell where it ends.
        """
        if self._ends or not (self._num_inner or ends_in_string(self._unread[: tag.start()])):
            return False
        self._num_inner += 1
        return True

    def _await_end(self, block: Block | None, end: int, resume: int) -> None:
        """Waits for what follows a call in XML: `block` up to `end`, or the call under way; `resume` is after it."""
        self._is_read = (block, end, resume)
        self._num_searched = resume
        self._step = self._read_after_xml

    def _read_after_xml(self) -> bool:
        after = tags.AFTER_XML.search(self._unread, self._num_searched)
        if after is None:
            self._num_searched = max(self._num_searched, len(self._unread) - tags.MOST_AFTER_XML)
        elif after["inside"] is None:
            self._end_read()
        else:
            block, _, resume = self._is_read
            self._num_searched = resume + len(TOOL_CALL) * self._unread.startswith(TOOL_CALL, resume)
            self._step = self._read_block
            if block is None:
                taken = "".join(self._taken)
                self._unread, self._depth = taken + self._unread, -1
                self._num_searched += len(taken)
        return after is not None

    def _end_read(self) -> None:
        block, end, resume = self._is_read
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
        """Ends the block at the first tag that can be its end, unless it goes on there `until` the next call."""
        end, resume = self._ends[0]
        goes_on = tags.rest_of_xml(self._unread, resume, until) if self._is_xml() else None
        if goes_on is None:
            self._end_block(self._block(self._unread[:end]), end, resume)
        else:
            self._end_block(Block(), goes_on, goes_on)

    def _finish_block(self, cut: bool) -> None:
        """Ends the block under way, after which no more text comes, at the end or at the first tag that can be it."""
        call = self._call
        if self._step == self._read_after_xml:
            self._end_read()
            return
        if self._step == self._read_call:
            if isinstance(call, JsonCall) and (call.done or (cut and call.is_all_but_closed)):
                self._end_call()
                self._unread = ""
                return
            self._unread = "".join(self._taken) + self._unread
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
        """Ends a block that the token limit cuts off: what was shown of it stays as it is."""
        if self._begun:
            self._leave_call()
        else:
            self._show("" if self._only_calls else self._opening + self._unread)
            self._step = self._read_content
        self._unread = ""

    def _block(self, text: str) -> Block:
        """What `text` says, in either form. In the other than the template's only tools that there are are called."""
        if self._is_xml():
            known_only = self._form == "json" or not self._opening
            return xml_block(text, self._schemas, self._schemas.names if known_only else None)
        block = json_block(text)
        known = self._form == "json" or all(call.name in self._schemas.names for call in block.calls)
        return block if known else Block(rest=text)

    def _is_xml(self) -> bool:
        """Whether the block under way is in XML."""
        return self._unread.lstrip().startswith("<")

    def _end_call(self) -> None:
        """Ends a call in the template's own form, up to its closing tags."""
        assert self._call.name is not None
        self._show_call(self._call.name, self._call.remaining_arguments())
        self._leave_call()

    def _end_block(self, block: Block, end: int, resume: int) -> None:
        """Shows the block up to `end` of the unread text, of which what follows `resume` is the next."""
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
        """Shows a part of the call under way; its first part names it."""
        if not self._begun:
            self._begun = True
            self._shown += Parsed(tool_calls=(ToolCallDelta(self._num_calls, self._new_id(), name),))
        if arguments:
            self._arguments.append(arguments)
            self._shown += Parsed(tool_calls=(ToolCallDelta(self._num_calls, arguments=arguments),))

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
