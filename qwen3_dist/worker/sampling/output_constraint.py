"""Token masks of one sequence: thinking within its budget, then structured output by a grammar.

A mask is int32 [ceil(V / 32)]; bit i % 32 of word i // 32 says whether token i is allowed. A token is forced by
forbidding all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3_dist.protocol.sampling_setup import SamplingSetup

if TYPE_CHECKING:
    from qwen3_dist.worker.sampling.grammar_matcher import Matcher

NewMatcher = Callable[[SamplingSetup], "Matcher"]
_BREAKS = (
    2  # line breaks allowed between </think> and the structured output, as the chat template writes them
)


class OutputConstraint:
    """The thinking budget and the grammar of one sequence. `error` says why the grammar cannot be followed further."""

    def __init__(self, setup: SamplingSetup, matcher: Matcher | None) -> None:
        self._setup = setup
        self._matcher = matcher
        self._may_think = setup.reasoning == "optional"
        self._thinks = setup.reasoning == "open"
        self._breaks_left = 0  # line breaks still allowed before the structured output
        self._num_thought = 0
        self._unread = setup.output

    @classmethod
    def of(cls, setup: SamplingSetup, new_matcher: NewMatcher) -> OutputConstraint | None:
        """The constraint of a new sequence; None if its text is free. The grammar is built in a thread."""
        if setup.grammar is None and setup.thinking_token_budget is None:
            return None
        return cls(setup, new_matcher(setup) if setup.grammar is not None else None)

    @property
    def error(self) -> str | None:
        return self._matcher.error if self._matcher is not None else None

    def accept(self, token_id: int) -> None:
        """Advances by the sampled token."""
        self._catch_up()
        self._advance(token_id)

    def mask(self, vocab_size: int) -> Tensor | None:
        """The mask of the next token, on the CPU; None if every token is allowed."""
        self._catch_up()
        budget, thinking = self._setup.thinking_token_budget, self._setup.thinking
        if self._thinks:
            assert thinking is not None
            if budget is not None and self._num_thought >= budget:
                return _only([thinking.closes], vocab_size)
            return _all_but(self._setup.eos_token_ids, vocab_size) if self._matcher is not None else None
        if self._matcher is None:
            return None
        row = _only((), vocab_size)
        self._matcher.fill_mask(row)
        if thinking is not None and self._may_think:
            _allow(row, [thinking.opens])
        elif thinking is not None:
            _allow(row, (token for token, count in thinking.breaks if count <= self._breaks_left))
        return row

    def _catch_up(self) -> None:
        """Advances by the tokens that were sampled before a preemption."""
        for token_id in self._unread:
            self._advance(token_id)
        self._unread = ()

    def _advance(self, token_id: int) -> None:
        thinking = self._setup.thinking
        if self._thinks:
            assert thinking is not None
            self._thinks = token_id != thinking.closes
            self._breaks_left = 0 if self._thinks else _BREAKS
            self._num_thought += 1
            return
        if thinking is not None and self._may_think and token_id == thinking.opens:
            self._thinks, self._may_think = True, False
            return
        self._may_think = False
        breaks = dict(thinking.breaks).get(token_id, 0) if thinking is not None else 0
        if 0 < breaks <= self._breaks_left:
            self._breaks_left -= breaks
            return
        self._breaks_left = 0
        if self._matcher is not None:
            self._matcher.accept(token_id)


def _only(token_ids: Iterable[int], vocab_size: int) -> Tensor:
    row = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
    _allow(row, token_ids)
    return row


def _all_but(token_ids: Iterable[int], vocab_size: int) -> Tensor:
    return ~_only(token_ids, vocab_size)


def _allow(row: Tensor, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        bit = 1 << token_id % 32
        row[token_id // 32] |= bit if bit < 1 << 31 else bit - (1 << 32)
