"""Answers that are a list of content blocks (reasoning, text, tool calls), each streamed as start, deltas and stop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import Answer, AnswerContext


@dataclass(frozen=True)
class Block:
    """A block's kind: "reasoning", "text" or "tool_call". A tool call also has its index, id and name."""

    kind: str
    call: int | None = None
    call_id: str | None = None
    name: str | None = None


class BlockAnswer(Answer):
    """Serializes one choice as blocks. At most one block is open; a part of another block closes it first."""

    def __init__(self, context: AnswerContext) -> None:
        super().__init__(context)
        self.last: ChoiceDelta | None = None
        self._open: Block | None = None
        self._blank = ""  # white space held back until other text of its block follows

    def delta(self, delta: ChoiceDelta) -> bytes:
        events = [self._show(block, text) for block, text in self._parts(delta)]
        self.last = delta
        return b"".join(events)

    def close(self) -> bytes:
        """Returns the events that end the open block, b"" if none is open."""
        block, self._open = self._open, None
        return self.close_block(block) if block else b""

    @abstractmethod
    def open_block(self, block: Block) -> bytes:
        """Returns the events that begin `block`."""

    @abstractmethod
    def extend_block(self, block: Block, text: str) -> bytes:
        """Returns the events that append `text` to `block`; for a tool call it is a part of the arguments."""

    @abstractmethod
    def close_block(self, block: Block) -> bytes:
        """Returns the events that end `block`."""

    def _parts(self, delta: ChoiceDelta) -> Iterator[tuple[Block, str]]:
        """Yields the delta's parts in the order of generation: the open tool call's arguments come first."""
        calls = [
            (Block("tool_call", call.index, call.id, call.name), call.arguments) for call in delta.tool_calls
        ]
        continued = [part for part in calls if self._open and part[0].call == self._open.call]
        yield from continued
        if delta.reasoning:
            yield Block("reasoning"), delta.reasoning
        if delta.text:
            yield Block("text"), delta.text
        yield from calls[len(continued) :]

    def _show(self, block: Block, text: str) -> bytes:
        if self._open and (self._open.kind, self._open.call) == (block.kind, block.call):
            return self.extend_block(self._open, text) if text else b""
        if block.kind == "text":
            # Clients reject text blocks of white space alone, such as the line breaks around tool calls.
            text = self._blank + text
            if text.isspace():
                self._blank = text
                return b""
        self._blank = ""
        events = self.close() + self.open_block(block)
        self._open = block
        return events + (self.extend_block(block, text) if text else b"")
