"""Qwen3-Reranker: whether a document answers a query, in the words that it was trained on, told by yes or no."""

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
    """Asks whether `document` is what `query` and `instruction` (absent, that of a web search) look for."""
    return _PROMPT.format(instruction or INSTRUCTION, query, document)


def relevance_pooling(tokenizer: Tokenizer) -> PoolingParams:
    """Reads the answer: the logits of yes and no. Raises RequestError for a tokenizer without these words."""
    yes, no = tokenizer.token_id("yes"), tokenizer.token_id("no")
    if yes is None or no is None:
        raise RequestError(
            'this model cannot rank: its tokenizer has no tokens "yes" and "no"; use a Qwen3-Reranker',
            param="model",
        )
    return PoolingParams(logits_of=(yes, no))


def relevance(logits: Sequence[float]) -> float:
    """The probability of yes, given that the answer is yes or no."""
    yes, no = logits
    odds = math.exp(-abs(yes - no))
    return (1 if yes >= no else odds) / (1 + odds)
