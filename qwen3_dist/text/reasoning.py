"""Splits reasoning, `<think>...</think>`, from content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.text.parsed import Parsed
from qwen3_dist.text.partial_match import partial_match

_THINK, _THINK_END = "<think>", "</think>"


def reasoning_state(prompt_text: str, template_source: str, template_kwargs: Mapping[str, Any]) -> str:
    """Returns the reasoning state after `prompt_text`, as in SamplingParams.reasoning.

    "open" if the prompt ends inside `<think>`, as the template of the 2507 Thinking models does. "none" if the
    assistant's turn already has reasoning or content, or if thinking is off or the template has no `enable_thinking`
    (2507 Instruct, Coder). Else "optional".
    """
    turn = prompt_text.rpartition("<|im_start|>")[2].rpartition("<|im_end|>")[2]
    begun = turn.removeprefix("assistant").strip()
    if begun.startswith(_THINK) and _THINK_END not in begun:
        return "open"
    can_think = "enable_thinking" in template_source and template_kwargs.get("enable_thinking") is not False
    return "optional" if can_think and not begun else "none"


class Reasoning:
    """Incrementally splits text that begins in `state`: "none", "optional" or "open".

    Reasoning may only precede the content. Newlines around the reasoning and repeated `<think>` tags are dropped, as
    chat templates drop newlines. The joined results do not depend on how the text was split into pushes.
    """

    def __init__(self, state: str) -> None:
        self._step = {
            "none": self._read_content,
            "optional": self._read_start,
            "open": self._read_first_thought,
        }[state]
        self._unread = ""
        self._is_over = False  # whether all that follows is content

    @property
    def is_thinking(self) -> bool:
        """Whether reasoning has begun and not ended."""
        return self._step in (self._read_first_thought, self._read_thought)

    def push(self, text: str) -> Parsed:
        """Adds `text`. Returns what is certain so far."""
        if self._is_over:
            return Parsed(text)
        self._unread += text
        shown = Parsed()
        step = None
        while step != self._step:
            step = self._step
            shown += step()
        self._is_over = step == self._read_content
        return shown

    def finish(self) -> Parsed:
        """Returns what was held back, at the end of the text."""
        unread, self._unread = self._unread, ""
        if self.is_thinking:
            return Parsed(reasoning=unread.rstrip("\n"))
        return Parsed() if self._step == self._read_first_content else Parsed(unread)

    # Each step returns what it parsed. It leaves in `_unread` what belongs to the next step or is not certain yet.

    def _read_start(self) -> Parsed:
        start = self._unread.lstrip()
        if start.startswith(_THINK):
            self._unread = start.removeprefix(_THINK)
            self._step = self._read_first_thought
        elif not _THINK.startswith(start):
            self._step = self._read_content
        return Parsed()

    def _read_first_thought(self) -> Parsed:
        while self._unread.startswith(("\n", _THINK)):
            self._unread = self._unread.lstrip("\n").removeprefix(_THINK)
        if not _THINK.startswith(self._unread):
            self._step = self._read_thought
        return Parsed()

    def _read_thought(self) -> Parsed:
        thought, closes, rest = self._unread.partition(_THINK_END)
        if closes:
            self._step = self._read_first_content
            self._unread = rest
            return Parsed(reasoning=thought.rstrip("\n"))
        certain = thought[: len(thought) - partial_match(thought, (_THINK_END,))].rstrip("\n")
        self._unread = thought[len(certain) :]
        return Parsed(reasoning=certain)

    def _read_first_content(self) -> Parsed:
        self._unread = self._unread.lstrip("\n")
        if self._unread:
            self._step = self._read_content
        return Parsed()

    def _read_content(self) -> Parsed:
        content, self._unread = self._unread, ""
        return Parsed(content)
