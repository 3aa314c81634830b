"""The parser of Qwen3's answers: reasoning, content and tool calls."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen3_dist.text.parsed import Parsed
from qwen3_dist.text.partial_match import partial_match
from qwen3_dist.text.reasoning import Reasoning
from qwen3_dist.text.tool_calls.stream import ToolCalls
from qwen3_dist.text.tool_calls.tags import FUNCTION

_PARTIAL_CALL = re.compile(r"<tool_call>\s*(?:<[a-z]*)?\Z")


class AnswerParser:
    """The OutputParser of Qwen3's answers. Without a `tool_calls` parser, text that looks like a call is content.

    Calls inside reasoning are drafts and stay reasoning, if the reasoning ends. If the answer ends inside reasoning,
    they are tool calls. Reasoning from the first such call on is held back until that is known.
    """

    def __init__(self, reasoning: Reasoning, tool_calls: ToolCalls | None) -> None:
        self._reasoning = reasoning
        self._tool_calls = tool_calls
        self._drafts = _DraftCalls(tool_calls.openings if tool_calls is not None else ())

    def push(self, text: str) -> Parsed:
        return self._split(self._reasoning.push(text))

    def finish(self, cut: bool = False) -> Parsed:
        rest = self._split(self._reasoning.finish())
        draft = self._drafts.release()
        if self._tool_calls is None:
            return rest
        if cut:
            return rest + Parsed(reasoning=draft) + self._tool_calls.finish(cut)
        if not self._reasoning.is_thinking:
            return rest + self._tool_calls.finish()
        called = self._tool_calls.push(draft) + self._tool_calls.finish()
        return rest + Parsed(reasoning=called.content.rstrip("\n"), tool_calls=called.tool_calls)

    def _split(self, parsed: Parsed) -> Parsed:
        if self._tool_calls is None:
            return parsed
        thought = self._drafts.push(parsed.reasoning)
        if not self._reasoning.is_thinking:
            thought += self._drafts.release()
        return Parsed(reasoning=thought) + self._tool_calls.push(parsed.content)


class _DraftCalls:
    """Passes on reasoning up to the first tool call in it, and holds back the rest."""

    def __init__(self, openings: Sequence[str]) -> None:
        self._openings = openings
        bare = f"|{FUNCTION}" if FUNCTION in openings else ""
        # The outer tag alone is often only mentioned, so the call must have begun.
        self._call = re.compile(rf"<tool_call>\s*(?:[\[{{]|{FUNCTION}){bare}")
        self._held = ""
        self._is_call = False

    def push(self, text: str) -> str:
        """Adds `text` of reasoning. Returns what certainly precedes the first call."""
        self._held += text
        if self._is_call:
            return ""
        call = self._call.search(self._held)
        self._is_call = call is not None
        if found := call or _PARTIAL_CALL.search(self._held):
            certain = found.start()
        else:
            certain = len(self._held) - partial_match(self._held, self._openings)
        shown = self._held[:certain].rstrip("\n")
        self._held = self._held[len(shown) :]
        return shown

    def release(self) -> str:
        """Returns what was held back."""
        held, self._held = self._held, ""
        return held
