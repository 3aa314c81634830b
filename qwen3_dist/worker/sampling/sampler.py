"""Samples one token per row of logits.

The randomness of a row is one uniform number, a hash of (seed, position). The token is the inverse of the row's
cumulative distribution at that number, so it does not depend on the rest of the batch.
Legend: L rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.base import DrawSettings, Ops
from qwen3_dist.ops.torch_draws import MOST_SELECTED
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.step_plan import SampleSpec

_MASK = (1 << 64) - 1
_Draw = Callable[[Tensor, DrawSettings], Tensor]  # logits [L, V] -> token ids [L]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits (SplitMix64's finaliser, Steele et al. 2014, twice)."""
    return (_mix(_mix(seed & _MASK) + position) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def sample(logits: Tensor, specs: Sequence[SampleSpec], ops: Ops) -> Tensor:
    """Returns token ids [L], one per row of logits [L, V]; greedy where the temperature is 0.

    Rows are grouped by the fastest kernel for their parameters: sorting the whole vocabulary is slow, and few rows
    need it.
    """
    some_greedy = any(spec.temperature == 0 for spec in specs)
    tokens = ops.greedy(logits) if some_greedy else logits.new_empty(len(specs), dtype=torch.int64)
    rows_of: dict[_Draw, list[int]] = {}
    for row, spec in enumerate(specs):
        if spec.temperature > 0:
            rows_of.setdefault(_kernel_for(ops, spec, logits.shape[-1]), []).append(row)
    for draw, rows in rows_of.items():
        if len(rows) == len(specs):
            return draw(logits, _settings(specs, logits))
        at = on_device(rows, torch.int64, logits.device)
        tokens[at] = draw(logits[at], _settings([specs[row] for row in rows], logits))
    return tokens


def _settings(specs: Sequence[SampleSpec], logits: Tensor) -> DrawSettings:
    vocab_size = logits.shape[-1]
    top_ks = [spec.top_k if spec.top_k > 0 else vocab_size for spec in specs]
    columns = (
        [spec.temperature for spec in specs],
        top_ks,
        [spec.top_p for spec in specs],
        [uniform(spec.seed, spec.position) for spec in specs],
    )
    return DrawSettings(on_device(columns, torch.float64, logits.device)[:, :, None], top_ks)


def _kernel_for(ops: Ops, spec: SampleSpec, vocab_size: int) -> _Draw:
    if 0 < spec.top_k <= MOST_SELECTED:
        return ops.draw_from_top_k
    cuts = spec.top_p < 1 or 0 < spec.top_k < vocab_size
    return ops.draw_from_top_p if cuts else ops.draw_from_all


class SampledLogprobs:
    """Logprobs of a step's sampled tokens and of the likeliest tokens, for the rows that request them.

    `wanted` has further token ids by row. The constructor starts the work on the device; `on_host` returns the
    results.
    """

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        specs: Sequence[SampleSpec],
        ops: Ops,
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
            logprobs = ops.log_softmax(logits[at])
            most = min(max(count for count in self._counts if count is not None), logits.shape[-1])
            chosen = logprobs.gather(1, tokens[at, None])[:, 0]
            width = max(len(self._wanted[row]) for row in rows)
            ids = [(*self._wanted[row], *(0,) * (width - len(self._wanted[row]))) for row in rows]
            named = on_device(ids, torch.int64, logits.device).view(len(rows), width)
            parts = (tokens[at], chosen, *ops.likeliest(logprobs, most), logprobs.gather(1, named))
            self._parts = [part.to("cpu", non_blocking=True) for part in parts]

    def on_host(self) -> tuple[TokenLogprob | None, ...]:
        """The logprobs of each row, None where none are requested. Call it when the device has finished the step."""
        rows = zip(*(part.tolist() for part in self._parts), strict=True) if self._parts else iter(())
        out: list[TokenLogprob | None] = []
        for count, wanted in zip(self._counts, self._wanted, strict=True):
            if count is None:
                out.append(None)
            else:
                token, logprob, values, ids, named = next(rows)
                top = dict(zip(ids[:count], values[:count], strict=True))
                top |= dict(zip(wanted, named, strict=False))
                out.append(TokenLogprob(token, logprob, tuple(top.items())))
        return tuple(out)
