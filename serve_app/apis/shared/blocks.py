"""Answers that are a row of blocks: reasoning, text and tool calls, one after the other, each with parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import Answer, Served


@dataclass(frozen=True)
class Block:
    """A block's kind ("reasoning", "text" or "tool_call"), and of a call its number, id and name."""

    kind: str
    call: int | None = None
    call_id: str | None = None
    name: str | None = None


class BlockAnswer(Answer):
    """Of one choice. At most one block is open; what is not of it closes it and opens the next."""

    def __init__(self, served: Served) -> None:
        super().__init__(served)
        self.last: ChoiceDelta | None = None
        self._open: Block | None = None
        self._blank = ""  # text so far that is only white space

    def delta(self, delta: ChoiceDelta) -> bytes:
        events = [self._show(block, text) for block, text in self._parts(delta)]
        self.last = delta
        return b"".join(events)

    def close(self) -> bytes:
        """Events that end the open block, if there is one."""
        block, self._open = self._open, None
        return self.close_block(block) if block else b""

    @abstractmethod
    def open_block(self, block: Block) -> bytes:
        """Events that begin `block`."""

    @abstractmethod
    def extend_block(self, block: Block, text: str) -> bytes:
        """Events that add `text` to the open block; of a tool call it is a part of its arguments."""

    @abstractmethod
    def close_block(self, block: Block) -> bytes:
        """Events that end `block`."""

    def _parts(self, delta: ChoiceDelta) -> Iterator[tuple[Block, str]]:
        """The delta's parts in the order in which they were generated: what goes on comes before what begins."""
        calls = [
            (Block("tool_call", call.index, call.id, call.name), call.arguments) for call in delta.tool_calls
        ]
        going_on = [part for part in calls if self._open and part[0].call == self._open.call]
        yield from going_on
        if delta.reasoning:
            yield Block("reasoning"), delta.reasoning
        if delta.text:
            yield Block("text"), delta.text
        yield from calls[len(going_on) :]

    def _show(self, block: Block, text: str) -> bytes:
        if self._open and (self._open.kind, self._open.call) == (block.kind, block.call):
            return self.extend_block(self._open, text) if text else b""
        if block.kind == "text":
            # Line breaks around tool calls are no text of their own, and clients refuse blocks of them.
            text = self._blank + text
            if text.isspace():
                self._blank = text
                return b""
        self._blank = ""
        events = self.close() + self.open_block(block)
        self._open = block
        return events + (self.extend_block(block, text) if text else b"")
