"""Sampling state of sequences that need more than temperature, top-k and top-p, on the rank that samples.

A sequence's state starts with the setup in its plan and ends when another sequence gets its slot. Grammars, bad words
of several tokens and thinking budgets need the sampled tokens on the host. They read the tokens of the last step just
before they sample, when the device already computes this step.
Legend: L rows of a step, R rows of sequences with a state, V vocab_size.
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
from qwen3_dist.worker.sampling.output_constraint import NewMatcher, OutputConstraint
from qwen3_dist.worker.sampling.penalties import Penalties
from qwen3_dist.worker.sampling.sampler import sample


class SamplingState:
    """The states by slot. `new_matcher` makes the matcher of a setup's grammar; `ops` samples."""

    def __init__(self, vocab_size: int, device: torch.device, new_matcher: NewMatcher, ops: Ops) -> None:
        self._vocab_size = vocab_size
        self._ops = ops
        self._new_matcher = new_matcher
        self._penalties = Penalties(vocab_size, device)
        self._states: dict[int, _SequenceState] = {}
        self._fp32 = torch.empty(0, vocab_size, device=device)

    def admit(self, steps: Sequence[SequenceStep]) -> None:
        """Creates states for the sequences whose plan has a setup."""
        for step in steps:
            if step.setup is not None:
                self._forget(step.slot)
                self._states[step.slot] = _SequenceState(
                    step.seq_id, step.setup, self._penalties, self._new_matcher
                )

    def sample(self, logits: Tensor, steps: Sequence[SequenceStep]) -> Sampled:
        """Samples one token for each spec of `steps` from logits [L, V], whose rows are in the same order."""
        specs = [spec for step in steps for spec in step.sample_specs]
        states = {
            row: state for row, step in _first_rows(steps) if (state := self._state_of(step)) is not None
        }
        if not states:
            return Sampled(sample(logits, specs, self._ops), specs)
        tokens = self._sample_rows(logits, specs, states)
        on_host = ToHost(tokens) if any(state.needs_tokens for state in states.values()) else None
        for row, state in states.items():
            state.add_token(on_host, row)
        return Sampled(
            tokens,
            specs,
            {row: state.setup.logprob_token_ids for row, state in states.items()},
            {row: state.error for row, state in states.items() if state.error},
        )

    def _sample_rows(
        self, logits: Tensor, specs: list[SampleSpec], states: dict[int, _SequenceState]
    ) -> Tensor:
        """Samples the rows without a state from their logits, the others from adjusted fp32 copies -> tokens [L]."""
        tokens = torch.empty(len(specs), dtype=torch.int64, device=logits.device)
        plain, rows = [row for row in range(len(specs)) if row not in states], list(states)
        slots = {row: state.penalty_slot for row, state in states.items() if state.penalty_slot is not None}
        plain_at, rows_at, penalised_at = rows_on_device((plain, rows, list(slots)), logits.device)
        if plain:
            tokens[plain_at] = sample(logits[plain_at], [specs[row] for row in plain], self._ops)
        adjusted_specs = [specs[row] for row in rows]
        adjusted = self._as_fp32(logits if len(rows) == len(specs) else logits[rows_at])
        self._adjust(adjusted, list(states.values()), adjusted_specs)
        tokens[rows_at] = sample(adjusted, adjusted_specs, self._ops)
        self._penalties.add(list(slots.values()), tokens[penalised_at])
        return tokens

    def _as_fp32(self, logits: Tensor) -> Tensor:
        """Copies logits to fp32 in a buffer that the next call reuses: allocating it takes longer than sampling."""
        if len(self._fp32) < len(logits):
            self._fp32 = self._fp32.new_empty(max(len(logits), 2 * len(self._fp32)), logits.shape[1])
        return self._fp32[: len(logits)].copy_(logits)

    def _state_of(self, step: SequenceStep) -> _SequenceState | None:
        """The sequence's state, or None. Removes a state that an earlier sequence left in the slot."""
        state = self._states.get(step.slot)
        if state is not None and state.seq_id != step.seq_id:
            self._forget(step.slot)
            return None
        return state

    def _forget(self, slot: int) -> None:
        state = self._states.pop(slot, None)
        if state is not None and state.penalty_slot is not None:
            self._penalties.close(state.penalty_slot)

    def _adjust(self, logits: Tensor, states: list[_SequenceState], specs: list[SampleSpec]) -> None:
        """Changes logits [R, V] in place, in vLLM's order: bias, min_tokens and bad words, penalties, structured
        outputs, min_p."""
        for row, state in zip(logits, states, strict=True):
            state.apply_bias(row)
        penalised = [index for index, state in enumerate(states) if state.penalty_slot is not None]
        if penalised:
            slots = [state.penalty_slot for state in states if state.penalty_slot is not None]
            self._penalties.apply(logits, penalised, slots, [states[row].setup for row in penalised])
        self._apply_constraints(logits, states)
        _apply_min_p(logits, [state.setup.min_p for state in states], specs)

    def _apply_constraints(self, logits: Tensor, states: list[_SequenceState]) -> None:
        """Masks logits by grammars and thinking budgets. If min_tokens and bad words leave no token that the mask
        allows, the mask alone decides."""
        masks, rows = [], []
        for index, state in enumerate(states):
            if state.constraint is not None and (mask := state.constraint.mask(self._vocab_size)) is not None:
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
    """A step's sampled tokens [L] and their specs. By row: further token ids whose logprobs are requested, and the
    reason why a sequence cannot go on."""

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


class _SequenceState:
    """The state of one sequence from its admission on."""

    def __init__(
        self, seq_id: int, setup: SamplingSetup, penalties: Penalties, new_matcher: NewMatcher
    ) -> None:
        self.seq_id = seq_id
        self.setup = setup
        self.penalty_slot = penalties.open(setup.prompt, setup.output) if setup.penalises else None
        self.constraint = OutputConstraint.of(setup, new_matcher)
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
        return self.constraint.error if self.constraint is not None else None

    @property
    def needs_tokens(self) -> bool:
        """Whether the state depends on the sequence's tokens, so that they must be copied to the host."""
        return bool(self._bad_words) or self.constraint is not None

    def add_token(self, tokens: ToHost | None, row: int) -> None:
        """Adds the sampled token in `row` of `tokens`, without waiting for the device."""
        self._num_output += 1
        if tokens is not None and self.needs_tokens:
            self._unread.append((tokens, row))

    def apply_bias(self, logits: Tensor) -> None:
        """Adds the logit bias to logits [V] and sets tokens to -inf that min_tokens or bad words forbid now."""
        self._read_tokens()
        if len(self._biased):
            logits[self._biased] += self._bias
        if self._num_output < self.setup.min_tokens:
            logits.index_fill_(0, self._stop_tokens, -torch.inf)
        if len(self._forbidden):
            logits.index_fill_(0, self._forbidden, -torch.inf)
        for *before, last in self._bad_words:
            if self._output[len(self._output) - len(before) :] == before:
                logits[last] = -torch.inf

    def _read_tokens(self) -> None:
        """Processes the tokens of earlier steps, waiting for their copies."""
        for tokens, row in self._unread:
            token_id = int(tokens.arrived()[0][row])
            if self.constraint is not None:
                self.constraint.accept(token_id)
            if self._bad_words:
                self._output = [*self._output[-self._longest :], token_id]
        self._unread.clear()


def _first_rows(steps: Sequence[SequenceStep]) -> list[tuple[int, SequenceStep]]:
    """Each sequence with the index of its first row of logits."""
    rows, row = [], 0
    for step in steps:
        rows.append((row, step))
        row += 1 + step.num_drafted
    return rows


def _unpacked(masks: Tensor, vocab_size: int) -> Tensor:
    """Unpacks masks int32 [R, ceil(V / 32)], where bit i % 32 of word i // 32 is token i, to bool [R, V]."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def _apply_min_p(logits: Tensor, min_p: list[float], specs: list[SampleSpec]) -> None:
    """Sets tokens to -inf that are less likely than `min_p` times the likeliest token, at each row's temperature."""
    least_log = [
        math.log(least) * spec.temperature if least > 0 and spec.temperature > 0 else -math.inf
        for least, spec in zip(min_p, specs, strict=True)
    ]
    if max(least_log) > -math.inf:
        below = on_device(least_log, torch.float32, logits.device)[:, None]
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + below, -torch.inf)
