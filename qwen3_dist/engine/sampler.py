"""Draws one token per row of logits.

A row's randomness is one uniform number made from (seed, position) by a counter-based hash, put through
the inverse of the row's cumulative distribution: what a sequence gets depends on nothing else in its
batch. Legend: L rows, V vocab_size, K kept logprobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.engine.outputs import TokenLogprob
from qwen3_dist.engine.plan import SampleSpec
from qwen3_dist.kernels import kernels_for
from qwen3_dist.transfer import on_device

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

    A row's candidates are ordered only as far as its own settings need, since a whole vocabulary takes long.
    """
    some_greedy = any(spec.temperature == 0 for spec in specs)
    tokens = _greedy(logits) if some_greedy else logits.new_empty(len(specs), dtype=torch.int64)
    rows_of: dict[_Draw, list[int]] = {}
    for row, spec in enumerate(specs):
        if spec.temperature > 0:
            rows_of.setdefault(_way_to_draw(spec, logits.shape[-1]), []).append(row)
    for draw, rows in rows_of.items():
        at = on_device(rows, torch.int64, logits.device)
        tokens[at] = draw(logits if len(rows) == len(specs) else logits[at], [specs[row] for row in rows])
    return tokens


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest token id [L] of logits [L, V], of equals the first."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.likeliest(logits)
    padded = _whole_blocks(logits)
    block = _largest(padded).argmax(dim=-1)
    rows = torch.arange(len(logits), device=logits.device)
    return block * _WIDTH + padded.unflatten(1, (-1, _WIDTH))[rows, block].argmax(dim=-1)


_Draw = Callable[[Tensor, Sequence[SampleSpec]], Tensor]  # from logits [L, V] of rows that draw
_MOST_SELECTED = 1024  # tokens up to which selecting the likeliest is faster than sorting all
_WIDTH = 64  # logits in a block


def _way_to_draw(spec: SampleSpec, vocab_size: int) -> _Draw:
    if 0 < spec.top_k <= _MOST_SELECTED:
        return _draw_from_top_k
    cuts = spec.top_p < 1 or 0 < spec.top_k < vocab_size
    return _draw_from_top_p if cuts else _draw_from_all


def _draw_from_top_k(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    candidates, ids = _likeliest(logits, max(spec.top_k for spec in specs))
    weights = _weights(candidates, candidates[:, :1], specs)
    return ids.gather(1, _draw_from_ordered(weights, None, specs))[:, 0]


def _draw_from_top_p(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    found = (
        None if logits.is_cuda else _nucleus(logits, specs)
    )  # a GPU would make the host wait for the answer
    if found is None:
        ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        found = _weights(ordered, ordered[:, :1], specs), ids, None
    weights, ids, total = found
    return ids.gather(1, _draw_from_ordered(weights, total, specs))[:, 0]


def _nucleus(logits: Tensor, specs: Sequence[SampleSpec]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Weights of the likeliest tokens, their ids and the weight of all, if in each row these are enough for top-p."""
    if any(spec.top_k > 0 for spec in specs):
        return None  # so large a top-k that it is not about the likeliest
    logits = logits.float()
    ordered, ids = _likeliest(logits, _MOST_SELECTED)
    weights = _weights(ordered, ordered[:, :1], specs)
    total = _weights(logits, ordered[:, :1], specs).sum(dim=-1, keepdim=True, dtype=torch.float64)
    reached = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    enough = reached >= _column([spec.top_p for spec in specs], logits) * total
    return (weights, ids, total) if bool(enough.all()) else None


def _draw_from_all(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """In the vocabulary's own order: first the block, then the token in it."""
    logits = logits.float()
    blocks = _weights(logits, logits.amax(dim=-1, keepdim=True), specs)
    blocks = F.pad(blocks, (0, -blocks.shape[-1] % _WIDTH)).unflatten(1, (-1, _WIDTH))
    cumulative = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    draws = _draws(specs, cumulative)
    block = _where(cumulative, draws)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(specs), device=logits.device), block[:, 0]]
    token = _where(inside.cumsum(dim=-1, dtype=torch.float64), draws - before)
    return (block * _WIDTH + token)[:, 0]


def _draw_from_ordered(weights: Tensor, total: Tensor | None, specs: Sequence[SampleSpec]) -> Tensor:
    """The column [L, 1] drawn from weights [L, C], largest first, which are all but what top-p would cut off.

    top-p keeps the fewest tokens that reach p among those that top-k kept, renormalised. `total` [L, 1] is
    the weight of all tokens where that is more than these.
    """
    ranks = torch.arange(weights.shape[-1], device=weights.device)
    kept = ranks < _column([spec.top_k if spec.top_k > 0 else weights.shape[-1] for spec in specs], weights)
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    reached = _column([spec.top_p for spec in specs], weights)
    reached = reached * (cumulative[:, -1:] if total is None else total)
    kept &= (cumulative - weights < reached) | (ranks == 0)
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    return _where(cumulative, _draws(specs, cumulative))


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of logits [L, V], of equal ones the first, with their token ids.

    All of them lie in the `count` blocks that have the largest maxima.
    """
    count = min(count, logits.shape[-1])
    padded = _whole_blocks(logits)
    blocks = padded.unflatten(1, (-1, _WIDTH))
    _, best = _ordered_topk(_largest(padded), min(count, blocks.shape[1]))
    best = best.sort(dim=-1).values
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    values, at = _ordered_topk(blocks[rows, best].float().flatten(1), count)
    return values, best.gather(1, at // _WIDTH) * _WIDTH + at % _WIDTH


def _whole_blocks(logits: Tensor) -> Tensor:
    padding = -logits.shape[-1] % _WIDTH
    return F.pad(logits, (0, padding), value=-torch.inf) if padding else logits


def _largest(logits: Tensor) -> Tensor:
    """The largest of each block of logits [L, V] -> fp32 [L, V / block]."""
    kernels = kernels_for(logits)
    if kernels is None:
        return logits.unflatten(1, (-1, _WIDTH)).amax(dim=-1).float()
    return kernels.largest(logits.contiguous(), _WIDTH)


def _ordered_topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of fp32 [L, C] by value, then by place: both are made into one integer."""
    bits = values.view(torch.int32)
    in_order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    columns = values.shape[-1]
    keys = (in_order.long() << 32) + torch.arange(columns - 1, -1, -1, device=values.device)
    at = columns - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
    return values.gather(1, at), at


def _weights(logits: Tensor, largest: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """exp(logit / temperature) up to a factor: the largest is 1, so that no temperature overflows or is 0."""
    temperatures = _column([spec.temperature for spec in specs], logits).float()
    temperatures = temperatures.clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - largest) / temperatures).exp()


def _draws(specs: Sequence[SampleSpec], cumulative: Tensor) -> Tensor:
    return _column([uniform(spec.seed, spec.position) for spec in specs], cumulative) * cumulative[:, -1:]


def _where(cumulative: Tensor, draws: Tensor) -> Tensor:
    """The column [L, 1] that holds each draw [L, 1]; the last that has any weight for one at the very end."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, draws, right=True), last)


def _column(values: list[float], like: Tensor) -> Tensor:
    return on_device(values, torch.float64, like.device)[:, None]


class SampledLogprobs:
    """Log-probabilities of a step's sampled tokens and of others, for the rows that ask: the likeliest, and
    those that `wanted` names by row.

    Computed on the device at construction; `on_host` waits for them.
    """

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        specs: Sequence[SampleSpec],
        wanted: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._wanted = [tuple((wanted or {}).get(row, ())) for row in range(len(specs))]
        self._counts = [
            0 if ids and spec.logprobs is None else spec.logprobs
            for spec, ids in zip(specs, self._wanted, strict=True)
        ]
        rows = [row for row, count in enumerate(self._counts) if count is not None]
        self._parts: list[Tensor] = []
        if rows:
            at = on_device(rows, torch.int64, logits.device)
            logprobs = logits[at].float().log_softmax(dim=-1)
            most = min(max(count for count in self._counts if count is not None), logits.shape[-1])
            chosen = logprobs.gather(1, tokens[at, None])[:, 0]
            width = max(len(self._wanted[row]) for row in rows)
            ids = [(*self._wanted[row], *(0,) * (width - len(self._wanted[row]))) for row in rows]
            named = on_device(ids, torch.int64, logits.device).view(len(rows), width)
            parts = (tokens[at], chosen, *logprobs.topk(most, dim=-1), logprobs.gather(1, named))
            self._parts = [part.to("cpu", non_blocking=True) for part in parts]

    def on_host(self) -> tuple[TokenLogprob | None, ...]:
        """For each row; call it when the device has finished the step."""
        asked = zip(*(part.tolist() for part in self._parts), strict=True) if self._parts else iter(())
        out: list[TokenLogprob | None] = []
        for count, wanted in zip(self._counts, self._wanted, strict=True):
            if count is None:
                out.append(None)
            else:
                token, logprob, values, ids, named = next(asked)
                top = dict(zip(ids[:count], values[:count], strict=True))
                top |= dict(zip(wanted, named, strict=False))
                out.append(TokenLogprob(token, logprob, tuple(top.items())))
        return tuple(out)
