"""What the rank that samples keeps of sequences that are not plain, and the draws of a step's mixed rows.

A sequence's state begins with the setup in its plan and ends when another sequence gets its slot. What
needs tokens on the host (grammars, bad words of several tokens, thinking budgets) reads the ones of the step
before just ahead of the draw, when the device already computes this step.
Legend: L rows of a step, R those of them with a state, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.transfer import ToHost, on_device, rows_on_device
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep
from qwen3_dist.worker.sampling.penalties import Penalties
from qwen3_dist.worker.sampling.sampler import sample
from qwen3_dist.worker.sampling.text_form import NewMatcher, TextForm


class SamplingState:
    """The states of one rank, by slot. `new_matcher` makes the follower of a grammar; `ops` draws."""

    def __init__(self, vocab_size: int, device: torch.device, new_matcher: NewMatcher, ops: Ops) -> None:
        self._vocab_size = vocab_size
        self._ops = ops
        self._new_matcher = new_matcher
        self._penalties = Penalties(vocab_size, device)
        self._rows: dict[int, _Row] = {}
        self._wide = torch.empty(0, vocab_size, device=device)

    def admit(self, steps: Sequence[SequenceStep]) -> None:
        """Takes the setups that a plan carries."""
        for step in steps:
            if step.setup is not None:
                self._forget(step.slot)
                self._rows[step.slot] = _Row(step.seq_id, step.setup, self._penalties, self._new_matcher)

    def sample(self, logits: Tensor, steps: Sequence[SequenceStep]) -> Sampled:
        """One token for each draw of `steps`, whose logits [L, V] are in their order."""
        specs = [spec for step in steps for spec in step.draws]
        at = {row: state for row, step in _rows_of(steps) if (state := self._of(step)) is not None}
        if not at:
            return Sampled(sample(logits, specs, self._ops), specs)
        tokens = torch.empty(len(specs), dtype=torch.int64, device=logits.device)
        plain = [row for row in range(len(specs)) if row not in at]
        rows, states = list(at), list(at.values())
        penalised = [row for row, state in at.items() if state.place is not None]
        plain_at, rows_at, penalised_at = rows_on_device((plain, rows, penalised), logits.device)
        if plain:
            tokens[plain_at] = sample(logits[plain_at], [specs[row] for row in plain], self._ops)
        drawn = [specs[row] for row in rows]
        chosen = self._widened(logits if len(rows) == len(specs) else logits[rows_at])
        tokens[rows_at] = sample(self._adjusted(chosen, states, drawn), drawn, self._ops)
        self._penalties.add([s.place for s in states if s.place is not None], tokens[penalised_at])
        arriving = ToHost(tokens) if any(state.reads for state in states) else None
        for row, state in at.items():
            state.take(arriving, row)
        return Sampled(
            tokens,
            specs,
            {row: state.setup.logprob_token_ids for row, state in at.items()},
            {row: state.error for row, state in at.items() if state.error},
        )

    def _widened(self, logits: Tensor) -> Tensor:
        """A copy in fp32, which lasts until the next: fresh memory of this size costs more than what is done in it."""
        if len(self._wide) < len(logits):
            self._wide = self._wide.new_empty(max(len(logits), 2 * len(self._wide)), logits.shape[1])
        return self._wide[: len(logits)].copy_(logits)

    def _of(self, step: SequenceStep) -> _Row | None:
        """The sequence's state; one that another sequence left behind in the slot is forgotten."""
        state = self._rows.get(step.slot)
        if state is not None and state.seq_id != step.seq_id:
            self._forget(step.slot)
            return None
        return state

    def _forget(self, slot: int) -> None:
        state = self._rows.pop(slot, None)
        if state is not None and state.place is not None:
            self._penalties.close(state.place)

    def _adjusted(self, logits: Tensor, states: list[_Row], specs: list[SampleSpec]) -> Tensor:
        """Logits [R, V], which are changed, in vLLM's order: bias, what must not come, penalties, form, min-p."""
        for row, state in zip(logits, states, strict=True):
            state.bias(row)
        penalised = [index for index, state in enumerate(states) if state.place is not None]
        if penalised:
            places = [state.place for state in states if state.place is not None]
            self._penalties.apply(logits, penalised, places, [states[row].setup for row in penalised])
        self._apply_forms(logits, states)
        _apply_min_p(logits, [state.setup.min_p for state in states], specs)
        return logits

    def _apply_forms(self, logits: Tensor, states: list[_Row]) -> None:
        """Forbids what forms forbid; where nothing would be left, bad words and the like yield to the form."""
        masks, rows = [], []
        for index, state in enumerate(states):
            if state.form is not None and (mask := state.form.mask(self._vocab_size)) is not None:
                masks.append(mask)
                rows.append(index)
        if not rows:
            return
        packed = on_device(torch.stack(masks), torch.int32, logits.device)
        forbidden = ~_unpacked(packed, self._vocab_size)
        at = on_device(rows, torch.int64, logits.device)
        allowed = logits[at].masked_fill(forbidden, -torch.inf)
        nothing = allowed.amax(dim=-1, keepdim=True) == -torch.inf
        logits[at] = torch.where(nothing & ~forbidden, 0.0, allowed)


class Sampled:
    """A step's tokens [L] with the specs they were drawn by; by row, other tokens whose log-probabilities are
    asked for, and why a sequence cannot go on."""

    def __init__(
        self,
        tokens: Tensor,
        specs: list[SampleSpec],
        logprob_token_ids: dict[int, tuple[int, ...]] | None = None,
        errors: dict[int, str] | None = None,
    ) -> None:
        self.tokens = tokens
        self.specs = specs
        self.logprob_token_ids = logprob_token_ids or {}
        self.errors = errors or {}


class _Row:
    """One sequence that is not plain, from its admission on."""

    def __init__(
        self, seq_id: int, setup: SamplingSetup, penalties: Penalties, new_matcher: NewMatcher
    ) -> None:
        self.seq_id = seq_id
        self.setup = setup
        self.place = penalties.open(setup.prompt, setup.output) if setup.penalises else None
        self.form = TextForm.of(setup, new_matcher)
        self._num_output = len(setup.output)
        self._bad_words = [word for word in setup.bad_words if len(word) > 1]
        self._longest = max(map(len, self._bad_words), default=0)
        self._output = list(setup.output) if self._bad_words else []
        self._unread: list[tuple[ToHost, int]] = []
        forbidden = [word[0] for word in setup.bad_words if len(word) == 1]
        bias = dict(setup.logit_bias)
        self._forbidden, self._stop_tokens, self._biased = rows_on_device(
            (forbidden, setup.stop_token_ids, list(bias)), penalties.device
        )
        self._bias = on_device(list(bias.values()), torch.float32, penalties.device)

    @property
    def error(self) -> str | None:
        return self.form.error if self.form is not None else None

    @property
    def reads(self) -> bool:
        """Whether the host must know the sequence's tokens."""
        return bool(self._bad_words) or self.form is not None

    def take(self, tokens: ToHost | None, row: int) -> None:
        """Takes a token that was drawn, without waiting for the device."""
        self._num_output += 1
        if tokens is not None and self.reads:
            self._unread.append((tokens, row))

    def bias(self, logits: Tensor) -> None:
        """Changes logits [V] by the bias and forbids what must not come now."""
        self._read()
        if len(self._biased):
            logits[self._biased] += self._bias
        if self._num_output < self.setup.min_tokens:
            logits.index_fill_(0, self._stop_tokens, -torch.inf)
        if len(self._forbidden):
            logits.index_fill_(0, self._forbidden, -torch.inf)
        for *before, last in self._bad_words:
            if self._output[len(self._output) - len(before) :] == before:
                logits[last] = -torch.inf

    def _read(self) -> None:
        for tokens, row in self._unread:
            token_id = int(tokens.arrived()[0][row])
            if self.form is not None:
                self.form.accept(token_id)
            if self._bad_words:
                self._output = [*self._output[-self._longest :], token_id]
        self._unread.clear()


def _rows_of(steps: Sequence[SequenceStep]) -> list[tuple[int, SequenceStep]]:
    """Each step's first row."""
    rows, row = [], 0
    for step in steps:
        rows.append((row, step))
        row += 1 + step.num_drafted
    return rows


def _unpacked(masks: Tensor, vocab_size: int) -> Tensor:
    """int32 [R, ceil(V / 32)], bit i % 32 of number i // 32 for token i -> bool [R, V]."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def _apply_min_p(logits: Tensor, min_p: list[float], specs: list[SampleSpec]) -> None:
    """Forbids tokens less likely than `min_p` times the likeliest, at each row's temperature."""
    least_log = [
        math.log(least) * spec.temperature if least > 0 and spec.temperature > 0 else -math.inf
        for least, spec in zip(min_p, specs, strict=True)
    ]
    if max(least_log) > -math.inf:
        below = on_device(least_log, torch.float32, logits.device)[:, None]
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + below, -torch.inf)
