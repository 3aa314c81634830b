"""The output of parsers: generated text split into content, reasoning and tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of tool call number `index` of a choice.

    The first part of a call has its `id` and `name`. The joined `arguments` of its parts are a JSON object, unless the
    token limit cut them off or the model wrote JSON that cannot be repaired.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(
    slots=True
)  # not frozen, which would triple what making one for each token costs; nobody changes one
class Parsed:
    """What a piece of generated text adds to content, reasoning and tool calls."""

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
    """Incrementally splits one choice's text into content, reasoning and tool calls.

    The joined results do not depend on how the text was split into pushes.
    """

    def push(self, text: str) -> Parsed:
        """Adds `text`. Returns what is certain so far, and holds the rest back."""

    def finish(self, cut: bool = False) -> Parsed:
        """Returns what was held back, at the end of the text. `cut`: the token limit ended it."""
