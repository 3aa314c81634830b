"""What the text of one sequence must be: thinking within its budget, then what a grammar allows.

No token is forced in another way than by forbidding all others. Masks are int32 [ceil(V / 32)], bit i % 32 of
number i // 32 for token i.
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
_BREAKS = 2  # line breaks that may stand between thoughts and the form, as the template writes them


class TextForm:
    """Where one sequence stands. `error` says why it cannot be followed any further."""

    def __init__(self, setup: SamplingSetup, matcher: Matcher | None) -> None:
        self._setup = setup
        self._matcher = matcher
        self._may_think = setup.reasoning == "optional"
        self._thinks = setup.reasoning == "open"
        self._breaks_left = 0  # line breaks that may still come ahead of the form
        self._num_thought = 0
        self._unread = setup.output

    @classmethod
    def of(cls, setup: SamplingSetup, new_matcher: NewMatcher) -> TextForm | None:
        """None where the text is free. The grammar's follower is built in a thread of its own meanwhile."""
        if setup.grammar is None and setup.thinking_token_budget is None:
            return None
        return cls(setup, new_matcher(setup) if setup.grammar is not None else None)

    @property
    def error(self) -> str | None:
        return self._matcher.error if self._matcher is not None else None

    def accept(self, token_id: int) -> None:
        """Steps over the token that was chosen."""
        self._catch_up()
        self._step_over(token_id)

    def mask(self, vocab_size: int) -> Tensor | None:
        """The tokens that may come now, on the CPU; None if any may."""
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
        """Steps over what the sequence said before it was preempted."""
        for token_id in self._unread:
            self._step_over(token_id)
        self._unread = ()

    def _step_over(self, token_id: int) -> None:
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
