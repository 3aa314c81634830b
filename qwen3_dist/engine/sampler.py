"""Draws one token per row of logits.

A row's randomness is one uniform number made from (seed, position) by a counter-based hash, put through
the inverse of the row's cumulative distribution: what a sequence gets depends on nothing else in its
batch. Legend: L rows, V vocab_size, K kept logprobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """One token id [L] per row of logits [L, V]; greedy where the temperature is 0.

    A row's candidates are sorted only as far as its own settings need, since a whole vocabulary takes long.
    """
    tokens = logits.argmax(dim=-1)
    rows_of: dict[_Arrangement, list[int]] = {}
    for row, spec in enumerate(specs):
        if spec.temperature > 0:
            rows_of.setdefault(_arrangement(spec, logits.shape[-1]), []).append(row)
    for arrange, rows in rows_of.items():
        at, drawing = torch.tensor(rows, device=logits.device), [specs[row] for row in rows]
        tokens[at] = _draw(*arrange(logits[at].float(), drawing), drawing)
    return tokens


# From logits [L, V] to those of the candidates [L, C] and their token ids [L or 1, C].
_Arrangement = Callable[[Tensor, Sequence[SampleSpec]], tuple[Tensor, Tensor]]
_MOST_SELECTED = 1024  # up to this top_k selecting is faster than sorting


def _arrangement(spec: SampleSpec, vocab_size: int) -> _Arrangement:
    if 0 < spec.top_k <= _MOST_SELECTED:
        return _selected
    cuts = spec.top_p < 1 or 0 < spec.top_k < vocab_size
    return _sorted if cuts else _unsorted


def _unsorted(logits: Tensor, _: Sequence[SampleSpec]) -> tuple[Tensor, Tensor]:
    return logits, torch.arange(logits.shape[-1], device=logits.device)[None]


def _sorted(logits: Tensor, _: Sequence[SampleSpec]) -> tuple[Tensor, Tensor]:
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    return ordered, ids


def _selected(logits: Tensor, specs: Sequence[SampleSpec]) -> tuple[Tensor, Tensor]:
    """The first columns of `_sorted`: logits and ids are selected as one integer, so that ties have an order."""
    vocab_size = logits.shape[-1]
    bits = logits.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys = (ordered.long() << 32) + torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    count = min(max(spec.top_k for spec in specs), vocab_size)
    ids = vocab_size - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def _draw(logits: Tensor, ids: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """One of each row's candidates, which come likeliest first if top-k or top-p cut any off."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # The largest logit is taken off first, so that a tiny temperature cannot overflow.
    temperatures = column([spec.temperature for spec in specs]).float()
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperatures).exp()
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    kept = ranks < column([spec.top_k if spec.top_k > 0 else logits.shape[-1] for spec in specs])
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    if any(spec.top_p < 1 for spec in specs):
        # top-p keeps the fewest tokens that reach p, among those that top-k kept, renormalised.
        reached = column([spec.top_p for spec in specs]) * cumulative[:, -1:]
        kept &= (cumulative - weights < reached) | (ranks == 0)
        cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    draws = column([uniform(spec.seed, spec.position) for spec in specs]) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, draws, right=True)
    # Rounding may put a draw at the very end, past the last candidate that has any weight.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return ids.expand_as(logits).gather(1, torch.minimum(chosen, last))[:, 0]


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
            logprobs = logits[at].float().log_softmax(dim=-1)
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
