"""Prompt outputs of a step: prompt logprobs, and the vectors of pooling requests.

Legend: T tokens of the step, D emb_dim, V vocab_size, R rows whose prompt logprobs are wanted, P pooling requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.model.step_memory import PROMPT_LOGPROBS_ROWS
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.transfer import rows_on_device
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.step_plan import PromptLogprobsSpec, PromptOutput, SequenceStep


class PromptOutputs:
    """The prompt outputs of one step. Computing them is collective: every tp rank of the last stage constructs this,
    and tp rank 0 has the results.

    The constructor starts the work on the device; `on_host` returns the results.
    """

    def __init__(self, model: Qwen3Model, hidden: Tensor, steps: Sequence[SequenceStep]) -> None:
        """`hidden` [T, D] are the hidden states of the tokens of `steps` after the last block."""
        self._specs: list[PromptLogprobsSpec] = []
        logprob_rows: list[int] = []
        pooled: list[tuple[int, PoolingParams]] = []
        begin = 0
        for step in steps:
            if isinstance(step.prompt_request, PromptLogprobsSpec):
                self._specs.append(step.prompt_request)
                first = begin + step.prompt_request.first
                logprob_rows.extend(range(first, first + len(step.prompt_request.targets)))
            elif step.prompt_request is not None:
                pooled.append((begin + len(step.token_ids) - 1, step.prompt_request))
            begin += len(step.token_ids)
        self._has_logprobs = [
            isinstance(step.prompt_request, PromptLogprobsSpec) for step in steps if step.prompt_request
        ]
        self._parts = _to_host(self._logprobs(model, hidden, logprob_rows)) if logprob_rows else []
        self._vectors = _to_host(_pool(model, hidden, pooled)) if pooled else []

    def _logprobs(self, model: Qwen3Model, hidden: Tensor, rows: list[int]) -> list[Tensor]:
        """Returns logprobs [R] and ranks [R] of the targets, and logprobs and ids of the likeliest tokens [R, most].

        Empty on tp ranks other than 0."""
        targets = [target for spec in self._specs for target in spec.targets]
        at, target_ids = rows_on_device((rows, targets), hidden.device)
        most = min(max(spec.top for spec in self._specs), model.config.vocab_size)
        parts = []
        for chunk, chunk_targets in zip(
            at.split(PROMPT_LOGPROBS_ROWS), target_ids.split(PROMPT_LOGPROBS_ROWS), strict=True
        ):
            logits = model.logits(hidden[chunk])
            if logits is not None:
                ops = model.ops
                logprobs = ops.log_softmax(logits)
                chosen = logprobs.gather(1, chunk_targets[:, None])
                ranks = 1 + (logprobs > chosen).sum(dim=-1)
                parts.append((chosen[:, 0], ranks, *ops.likeliest(logprobs, most)))
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def on_host(self) -> tuple[PromptOutput, ...]:
        """The output of each sequence with a `prompt_request`. Call it when the device has finished the step."""
        rows = zip(*(part.tolist() for part in self._parts), strict=True)
        specs = iter(self._specs)
        vectors = iter(self._vectors)
        return tuple(
            _token_logprobs(next(specs), rows) if has_logprobs else array("f", next(vectors).tolist())
            for has_logprobs in self._has_logprobs
        )


def _pool(model: Qwen3Model, hidden: Tensor, pooled: list[tuple[int, PoolingParams]]) -> list[Tensor]:
    """Returns the vector of each of the P requests, `pooled`: pairs of the row of its last token and its parameters.

    Where `logits_of` is set these logits are the vector, where `score` is set the score [1] is. Empty on tp ranks
    other than 0 if some request has `logits_of`."""
    rows_with_logits = [row for row, params in pooled if params.logits_of]
    token_ids = [params.logits_of for _, params in pooled if params.logits_of]
    at, last, *columns = rows_on_device(
        (rows_with_logits, [row for row, _ in pooled], *token_ids), hidden.device
    )
    logits = model.logits(hidden[at]) if rows_with_logits else hidden.new_empty(0)
    if logits is None:
        return []
    selected = (row[ids].float() for row, ids in zip(logits, columns, strict=True))
    normed = model.final_norm(hidden[last]).float()
    return [
        next(selected) if params.logits_of else _vector(model, state, params)
        for state, (_, params) in zip(normed, pooled, strict=True)
    ]


def _vector(model: Qwen3Model, state: Tensor, params: PoolingParams) -> Tensor:
    if params.score:  # not one product for all requests, so that no score depends on the others
        return (state * model.score.float()).sum(dim=-1)
    vector = state[: params.dimensions]
    return F.normalize(vector, dim=0) if params.normalize else vector


def _to_host(parts: Iterable[Tensor]) -> list[Tensor]:
    return [part.to("cpu", non_blocking=True) for part in parts]


def _token_logprobs(spec: PromptLogprobsSpec, rows: Iterator[tuple[Any, ...]]) -> tuple[TokenLogprob, ...]:
    """The prompt logprobs of one sequence, from the next of `rows`."""
    out = []
    for target, (logprob, rank, values, ids) in zip(spec.targets, rows, strict=False):
        top = zip(ids[: spec.top], values[: spec.top], strict=True)
        out.append(TokenLogprob(target, logprob, tuple(top), rank))
    return tuple(out)
