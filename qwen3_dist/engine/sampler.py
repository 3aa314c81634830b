"""Draws one token per row of logits.

A row's randomness is one uniform number made from (seed, position) by a counter-based hash, put through
the inverse of the row's cumulative distribution: what a sequence gets depends on nothing else in its
batch. Legend: L rows, V vocab_size, K kept logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.engine.outputs import TokenLogprob
from qwen3_dist.engine.plan import SampleSpec

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits (SplitMix64's finaliser, Steele et al. 2014, twice)."""
    return (_mix(_mix(seed & _MASK) + position) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """One token id [L] per row of logits [L, V]; greedy where the temperature is 0."""
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, spec in enumerate(specs) if spec.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        tokens[at] = _draw(logits[at], [specs[row] for row in drawn])
    return tokens


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    vocab_size = logits.shape[-1]
    temperatures = column([spec.temperature for spec in specs]).float()
    # The largest logit is taken off first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab_size, device=logits.device)
    top_k = column([spec.top_k if spec.top_k > 0 else vocab_size for spec in specs])
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # top-p keeps the fewest tokens that reach p, among those that top-k kept, renormalised.
    kept = ranks < top_k
    kept_mass = (probabilities * kept).sum(dim=-1, keepdim=True, dtype=torch.float64)
    before = cumulative - probabilities
    top_p = column([spec.top_p for spec in specs])
    kept &= (before < top_p * kept_mass) | (ranks == 0)
    cumulative = (probabilities * kept).cumsum(dim=-1, dtype=torch.float64)
    draws = column([uniform(spec.seed, spec.position) for spec in specs]) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, draws, right=True)
    last_kept = kept.sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(chosen, last_kept))[:, 0]


class SampledLogprobs:
    """Log-probabilities of a step's sampled tokens and of the likeliest others, for the rows that ask.

    Computed on the device at construction; `on_host` waits for them.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, specs: Sequence[SampleSpec]) -> None:
        self._counts = [spec.logprobs for spec in specs]
        rows = [row for row, count in enumerate(self._counts) if count is not None]
        self._parts: list[Tensor] = []
        if rows:
            at = torch.tensor(rows, device=logits.device)
            logprobs = logits[at].log_softmax(dim=-1)
            most = min(max(count for count in self._counts if count is not None), logits.shape[-1])
            chosen = logprobs.gather(1, tokens[at, None])[:, 0]
            parts = (tokens[at], chosen, *logprobs.topk(most, dim=-1))
            self._parts = [part.to("cpu", non_blocking=True) for part in parts]

    def on_host(self) -> tuple[TokenLogprob | None, ...]:
        """For each row; call it when the device has finished the step."""
        asked = zip(*(part.tolist() for part in self._parts), strict=True) if self._parts else iter(())
        out: list[TokenLogprob | None] = []
        for count in self._counts:
            if count is None:
                out.append(None)
            else:
                token, logprob, values, ids = next(asked)
                top = tuple(zip(ids[:count], values[:count], strict=True))
                out.append(TokenLogprob(token, logprob, top))
        return tuple(out)
