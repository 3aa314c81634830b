"""Qwen3-Reranker's question and answer, as its card has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_dist.text.reranking import INSTRUCTION, relevance, relevance_pooling, relevance_prompt
from qwen3_dist.text.tokenizer import Tokenizer

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen3-tokenizer"
# What the card puts before and after a pair; it tokenizes the three apart.
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
PAIRS = [("What is the sea?", "The sea is blue.\n"), ("  ", "{} 海 🌊\n\n"), ("<Query>: x", "")]


def test_the_question_is_the_cards() -> None:
    for query, document in PAIRS:
        pair = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        assert relevance_prompt(query, document) == BEFORE + pair + AFTER
    assert "<Instruct>: Find {jokes}\n" in relevance_prompt("q", "d", "Find {jokes}")


@pytest.mark.skipif(not REAL.exists(), reason="not at hand")
def test_it_has_the_token_ids_that_the_card_joins() -> None:
    tokenizer = Tokenizer.from_directory(REAL)
    assert tokenizer is not None
    for query, document in PAIRS:
        pair = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        joined = [token for part in (BEFORE, pair, AFTER) for token in tokenizer.encode(part)]
        assert tokenizer.encode(relevance_prompt(query, document)) == joined
    assert relevance_pooling(tokenizer).logits_of == (9693, 2152)


def test_relevance_has_no_overflow() -> None:
    assert relevance([1000.0, -1000.0]) == 1 and relevance([-1000.0, 1000.0]) == 0
    assert relevance([3.0, 3.0]) == 0.5
    assert relevance([-50.0, 0.0]) == pytest.approx(1.9287e-22, rel=1e-3)
