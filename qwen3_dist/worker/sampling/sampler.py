"""Draws one token per row of logits.

A row's randomness is one uniform number made from (seed, position) by a counter-based hash, put through
the inverse of the row's cumulative distribution: what a sequence gets depends on nothing else in its
batch. Legend: L rows, V vocab_size, K kept logprobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.model.step_memory import SORTED_ROWS
from qwen3_dist.ops.kernels import GpuKernels, gpu_kernels_for, kernels_for
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.step_plan import SampleSpec

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
        if len(rows) == len(specs):
            return draw(logits, _Settings.of(specs, logits))
        at = on_device(rows, torch.int64, logits.device)
        tokens[at] = draw(logits[at], _Settings.of([specs[row] for row in rows], logits))
    return tokens


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest token id [L] of logits [L, V], of equals the first."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.likeliest(logits)
    if logits.is_cuda:
        return logits.argmax(dim=-1)
    padded = _whole_blocks(logits)
    block = _largest(padded).argmax(dim=-1)
    rows = torch.arange(len(logits), device=logits.device)
    return block * _WIDTH + padded.unflatten(1, (-1, _WIDTH))[rows, block].argmax(dim=-1)


class _Settings(NamedTuple):
    """What rows draw by: fp64 [4, L, 1], namely temperature, top-k, top-p and the row's uniform number."""

    columns: Tensor
    top_ks: list[int]  # V where all are kept

    @classmethod
    def of(cls, specs: Sequence[SampleSpec], logits: Tensor) -> _Settings:
        top_ks = [spec.top_k if spec.top_k > 0 else logits.shape[-1] for spec in specs]
        columns = (
            [spec.temperature for spec in specs],
            top_ks,
            [spec.top_p for spec in specs],
            [uniform(spec.seed, spec.position) for spec in specs],
        )
        return cls(on_device(columns, torch.float64, logits.device)[:, :, None], top_ks)


_Draw = Callable[[Tensor, _Settings], Tensor]  # from logits [L, V] of rows that draw
_MOST_SELECTED = 1024  # tokens up to which selecting the likeliest is faster than sorting all
_WIDTH = 64  # logits in a block


def _way_to_draw(spec: SampleSpec, vocab_size: int) -> _Draw:
    if 0 < spec.top_k <= _MOST_SELECTED:
        return _draw_from_top_k
    cuts = spec.top_p < 1 or 0 < spec.top_k < vocab_size
    return _draw_from_top_p if cuts else _draw_from_all


def _draw_from_top_k(logits: Tensor, settings: _Settings) -> Tensor:
    kernels, most = gpu_kernels_for(logits), min(max(settings.top_ks), logits.shape[-1])
    if kernels is not None:
        keys = kernels.ordering_keys(logits).topk(most, dim=-1).values
        return kernels.draw_from_ordered(keys, logits.shape[-1], settings.columns)
    candidates, ids = _likeliest(logits, most)
    weights = _weights(candidates, candidates[:, :1], settings)
    return ids.gather(1, _draw_from_ordered(weights, None, settings))[:, 0]


def _draw_from_top_p(logits: Tensor, settings: _Settings) -> Tensor:
    kernels = gpu_kernels_for(logits)
    if kernels is not None:
        parts = zip(logits.split(SORTED_ROWS), settings.columns.split(SORTED_ROWS, dim=1), strict=True)
        return torch.cat([_draw_from_sorted(kernels, part, columns) for part, columns in parts])
    # On a GPU the host would wait for the answer.
    found = None if logits.is_cuda else _nucleus(logits, settings)
    if found is None:
        ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        found = _weights(ordered, ordered[:, :1], settings), ids, None
    weights, ids, total = found
    return ids.gather(1, _draw_from_ordered(weights, total, settings))[:, 0]


def _draw_from_sorted(kernels: GpuKernels, logits: Tensor, columns: Tensor) -> Tensor:
    keys = kernels.ordering_keys(logits).sort(dim=-1, descending=True).values
    return kernels.draw_from_ordered(keys, logits.shape[-1], columns.contiguous())


def _nucleus(logits: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Weights of the likeliest tokens, their ids and the weight of all, if in each row these are enough for top-p."""
    if min(settings.top_ks) < logits.shape[-1]:
        return None  # so large a top-k that it is not about the likeliest
    logits = logits.float()
    ordered, ids = _likeliest(logits, _MOST_SELECTED)
    weights = _weights(ordered, ordered[:, :1], settings)
    total = _weights(logits, ordered[:, :1], settings).sum(dim=-1, keepdim=True, dtype=torch.float64)
    reached = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    _, _, top_p, _ = settings.columns
    return (weights, ids, total) if bool((reached >= top_p * total).all()) else None


def _draw_from_all(logits: Tensor, settings: _Settings) -> Tensor:
    """In the vocabulary's own order: first the block, then the token in it."""
    kernels = gpu_kernels_for(logits)
    if kernels is not None:
        return kernels.draw_from_all(logits, settings.columns)
    logits = logits.float()
    blocks = _weights(logits, logits.amax(dim=-1, keepdim=True), settings)
    blocks = F.pad(blocks, (0, -blocks.shape[-1] % _WIDTH)).unflatten(1, (-1, _WIDTH))
    cumulative = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    draws = _draws(settings, cumulative)
    block = _where(cumulative, draws)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(logits), device=logits.device), block[:, 0]]
    token = _where(inside.cumsum(dim=-1, dtype=torch.float64), draws - before)
    return (block * _WIDTH + token)[:, 0]


def _draw_from_ordered(weights: Tensor, total: Tensor | None, settings: _Settings) -> Tensor:
    """The column [L, 1] drawn from weights [L, C], largest first, which are all but what top-p would cut off.

    top-p keeps the fewest tokens that reach p among those that top-k kept, renormalised. `total` [L, 1] is
    the weight of all tokens where that is more than these.
    """
    _, top_k, top_p, _ = settings.columns
    ranks = torch.arange(weights.shape[-1], device=weights.device)
    kept = ranks < top_k
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    reached = top_p * (cumulative[:, -1:] if total is None else total)
    kept &= (cumulative - weights < reached) | (ranks == 0)
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    return _where(cumulative, _draws(settings, cumulative))


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


def _weights(logits: Tensor, largest: Tensor, settings: _Settings) -> Tensor:
    """exp(logit / temperature) up to a factor: the largest is 1, so that no temperature overflows or is 0."""
    temperatures = settings.columns[0].float().clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - largest) / temperatures).exp()


def _draws(settings: _Settings, cumulative: Tensor) -> Tensor:
    return settings.columns[3] * cumulative[:, -1:]


def _where(cumulative: Tensor, draws: Tensor) -> Tensor:
    """The column [L, 1] that holds each draw [L, 1]; the last that has any weight for one at the very end."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, draws, right=True), last)


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
