"""Random texts under a grammar's mask: at each step any token that it allows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.worker.sampling.grammar_matcher import Grammars, Matcher

REPO = Path(__file__).resolve().parents[1]
BUNDLED = REPO / "qwen3_dist" / "bundled"
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"
DIRECTORIES = [
    pytest.param(BUNDLED, id="bundled"),
    pytest.param(REAL, id="real", marks=pytest.mark.skipif(not REAL.exists(), reason="not at hand")),
]
ENDINGS = ("</tool_call>", '"', "]", "}")  # a quote first: in a string the others are text


class Walker:
    """Walks over the vocabulary of a checkpoint's tokenizer, padded as models are."""

    def __init__(self, directory: Path) -> None:
        tokenizer = Tokenizer.from_directory(directory)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.vocab_size = -(-tokenizer.vocab_size // 128) * 128 + 128
        eos = [tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")]
        self.eos = [token for token in eos if token is not None]
        self.grammars = Grammars(directory, self.vocab_size, self.eos)
        self._row = torch.empty(self.vocab_size // 32, dtype=torch.int32)
        self._endings = [ids[0] for text in ENDINGS if len(ids := tokenizer.encode(text)) == 1]

    def mask(self, matcher: Matcher) -> np.ndarray:
        """Whether the mask allows each id."""
        self._row.fill_(-1)
        matcher.fill_mask(self._row)
        assert matcher.error is None, matcher.error
        return np.unpackbits(self._row.numpy().view(np.uint8), bitorder="little").view(bool)

    def allowed(self, matcher: Matcher) -> np.ndarray:
        """The ids that the mask allows."""
        return np.flatnonzero(self.mask(matcher))

    def walk(self, grammar: str, seed: int, wander: int = 40, most: int = 600) -> str:
        """A text of `grammar`: `wander` steps at random, then whatever leads to its end, up to EOS."""
        return self.tokenizer.decode(self.walk_ids(grammar, seed, wander, most), skip_special_tokens=False)

    def walk_ids(self, grammar: str, seed: int, wander: int = 40, most: int = 600) -> list[int]:
        """The tokens of such a text."""
        choose, matcher, ids = random.Random(seed), self.grammars.matcher(grammar), []
        for step in range(most):
            mask = self.mask(matcher)
            ends = [token for token in (*self.eos, *self._endings) if mask[token]]
            token = ends[0] if ends and step >= wander else int(choose.choice(np.flatnonzero(mask)))
            if token in self.eos:
                return ids
            ids.append(token)
            matcher.accept(token)
        raise AssertionError(f"no end after {most} tokens: {self.tokenizer.decode(ids[-50:])!r}")

    def admits(self, grammar: str, text: str) -> bool:
        """Whether the masks allow `text`, as the tokenizer splits it, and then EOS."""
        matcher = self.grammars.matcher(grammar)
        for token in self.tokenizer.encode(text):
            if token not in self.allowed(matcher):
                return False
            matcher.accept(token)
        return self.eos[0] in self.allowed(matcher)


_walkers: dict[Path, Walker] = {}


def walker_of(directory: Path) -> Walker:
    """One per tokenizer: a real one takes a second."""
    if directory not in _walkers:
        _walkers[directory] = Walker(directory)
    return _walkers[directory]
