"""Sampling in plain torch. Legend: L rows, V vocab_size, C candidates of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.base import DrawSettings, Ops
from qwen3_dist.ops.slices import SORTED_ROWS

MOST_SELECTED = 1024  # up to this top-k, selecting candidates is faster than sorting all
WIDTH = 64  # logits of a block of the vocabulary


class TorchDraws(Ops):
    """The sampling operations of `Ops`. The likeliest tokens are found by the maxima of blocks of the vocabulary."""

    def greedy(self, logits: Tensor) -> Tensor:
        if logits.is_cuda:
            return logits.argmax(dim=-1)
        padded = _whole_blocks(logits)
        block = self._largest_of_blocks(padded).argmax(dim=-1)
        rows = torch.arange(len(logits), device=logits.device)
        return block * WIDTH + padded.unflatten(1, (-1, WIDTH))[rows, block].argmax(dim=-1)

    def log_softmax(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(dim=-1)

    def likeliest(self, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return logprobs.topk(count, dim=-1)

    def draw_from_top_k(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        candidates, ids = self._likeliest(logits, min(max(settings.top_ks), logits.shape[-1]))
        weights = _weights(candidates, candidates[:, :1], settings)
        return ids.gather(1, _draw_from_ordered(weights, None, settings))[:, 0]

    def draw_from_top_p(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        # On a GPU `_nucleus` would make the host wait.
        found = None if logits.is_cuda else self._nucleus(logits, settings)
        if found is None:
            logits = logits.float()
            ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
            total = _total(_weights(logits, ordered[:, :1], settings))
            total *= settings.columns[1] >= logits.shape[-1]
            found = _weights(ordered, ordered[:, :1], settings), ids, total
        weights, ids, total = found
        return ids.gather(1, _draw_from_ordered(weights, total, settings))[:, 0]

    def draw_from_all(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Samples a block of the vocabulary first, then a token in it."""
        logits = logits.float()
        weights = _weights(logits, logits.amax(dim=-1, keepdim=True), settings)
        blocks, cumulative = _cumulative_blocks(weights)
        draws = _draws(settings, cumulative)
        block = _column_of(cumulative, draws)
        before = F.pad(cumulative, (1, 0)).gather(1, block)
        inside = blocks[torch.arange(len(logits), device=logits.device), block[:, 0]]
        token = _column_of(inside.cumsum(dim=-1, dtype=torch.float64), draws - before)
        return (block * WIDTH + token)[:, 0]

    def _nucleus(self, logits: Tensor, settings: DrawSettings) -> tuple[Tensor, Tensor, Tensor] | None:
        """The MOST_SELECTED likeliest tokens, if they contain the nucleus (top-p) of each row: their weights and ids,
        and the total weight of all tokens. Else None."""
        if min(settings.top_ks) < logits.shape[-1]:
            return None  # a top-k above MOST_SELECTED
        logits = logits.float()
        ordered, ids = self._likeliest(logits, MOST_SELECTED)
        weights = _weights(ordered, ordered[:, :1], settings)
        total = _total(_weights(logits, ordered[:, :1], settings))
        reached = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
        _, _, top_p, _ = settings.columns
        return (weights, ids, total) if bool((reached >= top_p * total).all()) else None

    def _likeliest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of logits [L, V] in order, and their token ids; equal logits by token id.

        All of them lie in the `count` blocks with the largest maxima.
        """
        count = min(count, logits.shape[-1])
        padded = _whole_blocks(logits)
        blocks = padded.unflatten(1, (-1, WIDTH))
        _, best = ordered_topk(self._largest_of_blocks(padded), min(count, blocks.shape[1]))
        best = best.sort(dim=-1).values
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        values, at = ordered_topk(blocks[rows, best].float().flatten(1), count)
        return values, best.gather(1, at // WIDTH) * WIDTH + at % WIDTH

    def _largest_of_blocks(self, logits: Tensor) -> Tensor:
        """The maximum of each block of logits [L, V] -> fp32 [L, V / WIDTH]."""
        return logits.unflatten(1, (-1, WIDTH)).amax(dim=-1).float()


def _draw_from_ordered(weights: Tensor, total: Tensor | None, settings: DrawSettings) -> Tensor:
    """Samples a column [L, 1] of weights [L, C], which are sorted, largest first.

    top-p keeps the smallest number of tokens that reach p among the tokens that top-k keeps, renormalised. `total`
    [L, 1] is the weight of all tokens, 0 in rows with a top-k; None if all rows have one.
    """
    _, top_k, top_p, _ = settings.columns
    ranks = torch.arange(weights.shape[-1], device=weights.device)
    kept = ranks < top_k
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    all_kept = cumulative[:, -1:]
    if total is not None:
        all_kept = torch.where(total > 0, total, all_kept)
    reached = top_p * all_kept
    kept &= (cumulative - weights < reached) | (ranks == 0)
    cumulative = (weights * kept).cumsum(dim=-1, dtype=torch.float64)
    return _column_of(cumulative, _draws(settings, cumulative))


def _whole_blocks(logits: Tensor) -> Tensor:
    padding = -logits.shape[-1] % WIDTH
    return F.pad(logits, (0, padding), value=-torch.inf) if padding else logits


def ordered_topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of fp32 [L, C] by value, then by column. Few rows at a time, which limits memory."""
    if len(values) > SORTED_ROWS:
        parts = zip(*(ordered_topk(few, count) for few in values.split(SORTED_ROWS)), strict=True)
        found, at = map(torch.cat, parts)
        return found, at
    # value and column in one integer
    bits = values.view(torch.int32)
    in_order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    columns = values.shape[-1]
    keys = (in_order.long() << 32) + torch.arange(columns - 1, -1, -1, device=values.device)
    at = columns - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
    return values.gather(1, at), at


def _cumulative_blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [L, V] in blocks [L, B, WIDTH], the last padded with 0, and the cumulative sums of blocks, fp64 [L, B].
    A row's sums do not depend on other rows."""
    blocks = F.pad(weights, (0, -weights.shape[-1] % WIDTH)).unflatten(1, (-1, WIDTH))
    return blocks, blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)


def _total(weights: Tensor) -> Tensor:
    """The sum of each row of weights [L, V] -> fp64 [L, 1]."""
    return _cumulative_blocks(weights)[1][:, -1:]


def _weights(logits: Tensor, largest: Tensor, settings: DrawSettings) -> Tensor:
    """exp((logit - largest) / temperature): at most 1, so that no temperature overflows."""
    temperatures = settings.columns[0].float().clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - largest) / temperatures).exp()


def _draws(settings: DrawSettings, cumulative: Tensor) -> Tensor:
    return settings.columns[3] * cumulative[:, -1:]


def _column_of(cumulative: Tensor, draws: Tensor) -> Tensor:
    """The column [L, 1] where the cumulative weight exceeds each draw [L, 1], at most the last with a weight above
    0."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, draws, right=True), last)
