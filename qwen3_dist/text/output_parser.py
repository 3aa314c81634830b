"""A model's answer as it comes, told apart: what it thinks, what it says, and the tools it calls."""

from __future__ import annotations

from qwen3_dist.text.parsed import Parsed
from qwen3_dist.text.reasoning import Reasoning
from qwen3_dist.text.tool_calls import ToolCalls


class AnswerParser:
    """The OutputParser of Qwen3's answers. Without `tool_calls`, what looks like a call is content."""

    def __init__(self, reasoning: Reasoning, tool_calls: ToolCalls | None) -> None:
        self._reasoning = reasoning
        self._tool_calls = tool_calls

    def push(self, text: str) -> Parsed:
        return self._told_apart(self._reasoning.push(text))

    def finish(self) -> Parsed:
        rest = self._told_apart(self._reasoning.finish())
        return rest + self._tool_calls.finish() if self._tool_calls is not None else rest

    def _told_apart(self, parsed: Parsed) -> Parsed:
        if self._tool_calls is None:
            return parsed
        return Parsed(reasoning=parsed.reasoning) + self._tool_calls.push(parsed.content)
