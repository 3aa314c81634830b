"""What a piece of generated text is, once reasoning and tool calls are told from content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of the answer's tool call number `index`.

    The first part of a call has its `id` and `name`. The `arguments` of all its parts, joined, are JSON of an object,
    unless the token limit cut them off or the model wrote what cannot be mended.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Parsed:
    """What a piece of text adds to each part of the answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, later: Parsed) -> Parsed:
        return Parsed(
            self.content + later.content,
            self.reasoning + later.reasoning,
            self.tool_calls + later.tool_calls,
        )


class OutputParser(Protocol):
    """Tells reasoning and tool calls from content in one choice's text, as it comes.

    How the text was split into pushes changes nothing of what its parts, joined, are.
    """

    def push(self, text: str) -> Parsed:
        """What `text` adds for certain; the rest is held back."""

    def finish(self, cut: bool = False) -> Parsed:
        """What was held back, once no more text comes; `cut` if that is because of the token limit."""
