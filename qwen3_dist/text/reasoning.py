"""Tells what a model thinks, `<think>...</think>`, from what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.text.parsed import Parsed
from qwen3_dist.text.partial_match import partial_match

_OPENS, _CLOSES = "<think>", "</think>"


def reasoning_state(prompt_text: str, template_source: str, template_kwargs: Mapping[str, Any]) -> str:
    """Where thinking stands after `prompt_text`, as SamplingParams.reasoning has it.

    "open" if the assistant's turn at its end has begun to think, as the 2507 Thinking models' template lets it.
    "none" if it has thought already, or has said something, or if the template has no switch for thinking
    (2507 Instruct, Coder) or it is off. Else "optional".
    """
    turn = prompt_text.rpartition("<|im_start|>")[2].rpartition("<|im_end|>")[2]
    said = turn.removeprefix("assistant").strip()
    if said.startswith(_OPENS) and _CLOSES not in said:
        return "open"
    can_think = "enable_thinking" in template_source and template_kwargs.get("enable_thinking") is not False
    return "optional" if can_think and not said else "none"


class Reasoning:
    """Reads text that begins in `state`: "none", "optional" or "open".

    A model thinks once, and first. Newlines at either end of its thoughts and ahead of what it says then are
    dropped, as its template drops them, and so is a <think> that it repeats. How the text is split changes nothing of
    what the parts, joined, are.
    """

    def __init__(self, state: str) -> None:
        self._step = {
            "none": self._read_content,
            "optional": self._read_start,
            "open": self._read_first_thought,
        }[state]
        self._unread = ""

    @property
    def is_thinking(self) -> bool:
        """Whether thoughts have begun and not ended."""
        return self._step in (self._read_first_thought, self._read_thought)

    def push(self, text: str) -> Parsed:
        """What `text` adds for certain."""
        self._unread += text
        shown = Parsed()
        step = None
        while step != self._step:
            step = self._step
            shown += step()
        return shown

    def finish(self) -> Parsed:
        """What was held back, once no more text comes."""
        unread, self._unread = self._unread, ""
        if self.is_thinking:
            return Parsed(reasoning=unread.rstrip("\n"))
        return Parsed() if self._step == self._read_first_content else Parsed(unread)

    # Each step shows what it reads, and leaves unread what is the next one's or is not certain yet.

    def _read_start(self) -> Parsed:
        start = self._unread.lstrip()
        if start.startswith(_OPENS):
            self._unread = start.removeprefix(_OPENS)
            self._step = self._read_first_thought
        elif not _OPENS.startswith(start):
            self._step = self._read_content
        return Parsed()

    def _read_first_thought(self) -> Parsed:
        while self._unread.startswith(("\n", _OPENS)):
            self._unread = self._unread.lstrip("\n").removeprefix(_OPENS)
        if not _OPENS.startswith(self._unread):
            self._step = self._read_thought
        return Parsed()

    def _read_thought(self) -> Parsed:
        thought, closes, rest = self._unread.partition(_CLOSES)
        if closes:
            self._step = self._read_first_content
            self._unread = rest
            return Parsed(reasoning=thought.rstrip("\n"))
        certain = thought[: len(thought) - partial_match(thought, (_CLOSES,))].rstrip("\n")
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
