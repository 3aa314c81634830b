"""Qwen3-Reranker: its prompt, and the relevance from the logits of "yes" and "no", or from a score head."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.text.tokenizer import Tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {}\n<Query>: {}\n<Document>: {}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def relevance_prompt(query: str, document: str, instruction: str | None = None) -> str:
    """Returns the prompt that asks whether `document` answers `query`; `instruction` defaults to web search."""
    return _PROMPT.format(instruction or INSTRUCTION, query, document)


def relevance_pooling(tokenizer: Tokenizer, has_score: bool = False) -> PoolingParams:
    """Returns the params that read the score if the model `has_score`, else the logits of yes and no. Raises
    RequestError if these are not tokens."""
    if has_score:
        return PoolingParams(score=True)
    yes, no = tokenizer.token_id("yes"), tokenizer.token_id("no")
    if yes is None or no is None:
        raise RequestError(
            'this model cannot rank: its tokenizer has no tokens "yes" and "no"; use a Qwen3-Reranker',
            param="model",
        )
    return PoolingParams(logits_of=(yes, no))


def relevance(logits: Sequence[float]) -> float:
    """Returns the relevance from 0 to 1: softmax over the `logits` (yes, no), or the sigmoid of a score alone."""
    yes, no = logits if len(logits) == 2 else (*logits, 0.0)
    odds = math.exp(-abs(yes - no))
    return (1 if yes >= no else odds) / (1 + odds)
