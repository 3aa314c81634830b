"""What a piece of generated text is, once reasoning and tool calls are told from content."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of the answer's tool call number `index`.

    The first part of a call has its `id` and `name`; the `arguments` of all its parts, joined, are valid JSON.
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
