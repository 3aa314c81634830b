"""What a step reads of its prompts beside the tokens it draws: log-probabilities of their tokens, and vectors.

Legend: T tokens of the step, D emb_dim, V vocab_size, R rows that are scored, P sequences that are pooled.
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
    """Every tp rank of the last stage makes it, since they share the head; rank 0 then has the answers.

    Computed on the device at construction; `on_host` waits for them.
    """

    def __init__(self, model: Qwen3Model, hidden: Tensor, steps: Sequence[SequenceStep]) -> None:
        """`hidden` [T, D] is what the model's last block made of `steps`."""
        self._scores: list[PromptLogprobsSpec] = []
        scored: list[int] = []
        pooled: list[tuple[int, PoolingParams]] = []
        begin = 0
        for step in steps:
            if isinstance(step.prompt_request, PromptLogprobsSpec):
                self._scores.append(step.prompt_request)
                first = begin + step.prompt_request.first
                scored.extend(range(first, first + len(step.prompt_request.targets)))
            elif step.prompt_request is not None:
                pooled.append((begin + len(step.token_ids) - 1, step.prompt_request))
            begin += len(step.token_ids)
        self._is_score = [
            isinstance(step.prompt_request, PromptLogprobsSpec) for step in steps if step.prompt_request
        ]
        self._parts = _to_host(self._score(model, hidden, scored)) if scored else []
        self._vectors = _to_host(_pool(model, hidden, pooled)) if pooled else []

    def _score(self, model: Qwen3Model, hidden: Tensor, rows: list[int]) -> list[Tensor]:
        """Log-probabilities and ranks of the targets [R], and values and ids of the likeliest [R, most]."""
        targets = [target for scores in self._scores for target in scores.targets]
        at, wanted = rows_on_device((rows, targets), hidden.device)
        most = min(max(scores.top for scores in self._scores), model.config.vocab_size)
        parts = []
        for chunk, chunk_wanted in zip(
            at.split(PROMPT_LOGPROBS_ROWS), wanted.split(PROMPT_LOGPROBS_ROWS), strict=True
        ):
            logits = model.logits(hidden[chunk])
            if logits is not None:
                logits = logits.float()
                total = logits.logsumexp(dim=-1, keepdim=True)
                values, ids = logits.topk(most, dim=-1)
                asked = logits.gather(1, chunk_wanted[:, None])
                ranks = 1 + (logits > asked).sum(dim=-1)
                parts.append(((asked - total)[:, 0], ranks, values - total, ids))
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def on_host(self) -> tuple[PromptOutput, ...]:
        """For each step that has a `reading`; call it when the device has finished the step."""
        asked = zip(*(part.tolist() for part in self._parts), strict=True)
        scores = iter(self._scores)
        vectors = iter(self._vectors)
        return tuple(
            _scored(next(scores), asked) if is_score else array("f", next(vectors).tolist())
            for is_score in self._is_score
        )


def _pool(model: Qwen3Model, hidden: Tensor, pooled: list[tuple[int, PoolingParams]]) -> list[Tensor]:
    """Of each of P rows its vector, or the logits asked for in its place, which tp rank 0 alone has."""
    asking = [row for row, params in pooled if params.logits_of]
    wanted = [params.logits_of for _, params in pooled if params.logits_of]
    asked, last, *named = rows_on_device((asking, [row for row, _ in pooled], *wanted), hidden.device)
    logits = model.logits(hidden[asked]) if asking else hidden.new_empty(0)
    if logits is None:
        return []
    answers = (row[ids].float() for row, ids in zip(logits, named, strict=True))
    normed = model.final_norm(hidden[last]).float()
    return [
        next(answers) if params.logits_of else _vector(state, params)
        for state, (_, params) in zip(normed, pooled, strict=True)
    ]


def _vector(state: Tensor, params: PoolingParams) -> Tensor:
    vector = state[: params.dimensions]
    return F.normalize(vector, dim=0) if params.normalize else vector


def _to_host(parts: Iterable[Tensor]) -> list[Tensor]:
    return [part.to("cpu", non_blocking=True) for part in parts]


def _scored(scores: PromptLogprobsSpec, asked: Iterator[tuple[Any, ...]]) -> tuple[TokenLogprob, ...]:
    out = []
    for target, (logprob, rank, values, ids) in zip(scores.targets, asked, strict=False):
        top = zip(ids[: scores.top], values[: scores.top], strict=True)
        out.append(TokenLogprob(target, logprob, tuple(top), rank))
    return tuple(out)
