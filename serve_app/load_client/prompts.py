"""Prompts of an exact length in the served model's tokens, made of random words."""

from __future__ import annotations

import asyncio
import math
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qwen3_dist.errors import ConfigError
from serve_app.load_client.datasets import HASH_BLOCK, Sample, Shape, within_limits

_LETTERS = (2, 7)  # in a word
_TRIES = 12  # to find a text of an exact length
_PROBE_WORDS = 200


class TextRefused(ConfigError):
    """A text that a service's tokenizer does not take, being too long for instance."""


class Tokens(Protocol):
    """Text to token ids and back. `encode` raises TextRefused."""

    async def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    async def decode(self, ids: Sequence[int]) -> str: ...


class FileTokens:
    """`Tokens` of a tokenizer.json, or of the directory that holds one. Raises ConfigError for anything else."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"there is no {file}; --tokenizer takes a tokenizer.json or its directory")
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every kind of damage
            raise ConfigError(f"{file} is not a usable tokenizer ({error}); fetch it again") from None

    async def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    async def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


class PromptMaker:
    """Makes prompts that are the same for the same seed and tokenizer. Use `create`."""

    def __init__(self, tokens: Tokens, seed: int, special_tokens: int, tokens_per_word: float) -> None:
        self._tokens = tokens
        self._seed = seed
        self._special_tokens = special_tokens
        self._tokens_per_word = tokens_per_word

    @classmethod
    async def create(cls, tokens: Tokens, seed: int) -> PromptMaker:
        """Asks the tokenizer how many special tokens a prompt gets, and about how many tokens a random word has."""
        plain, special = await asyncio.gather(tokens.encode("sea"), tokens.encode("sea", True))
        text = _words(random.Random(seed), _PROBE_WORDS)
        return cls(tokens, seed, len(special) - len(plain), len(await tokens.encode(text)) / _PROBE_WORDS)

    async def samples(self, shapes: Sequence[Shape]) -> list[Sample]:
        """A prompt of exactly `input_len` tokens for each shape. Raises ConfigError."""
        longest = max((shape.prefix_len for shape in shapes), default=0)
        prefix = await self.prompt("prefix", longest + self._special_tokens) if longest else ""

        async def sample(number: int, shape: Shape) -> Sample:
            opening = prefix or " ".join(map(self._block, shape.hash_ids))
            prompt = await self.prompt(str(number), shape.input_len, opening)
            return Sample(prompt, shape.input_len, shape.output_len)

        return list(await asyncio.gather(*(sample(*each) for each in enumerate(shapes))))

    async def turns(self, turns: Sequence[tuple[str, str]], count: int) -> list[Sample]:
        """The first `count` prompts within vLLM's limits, with the lengths of their answers; fewer if there are."""
        found: list[Sample] = []
        for start in range(0, len(turns), count):
            part = turns[start : start + count]
            lengths = await asyncio.gather(*(self._lengths(*turn) for turn in part))
            for (prompt, _), (input_len, output_len) in zip(part, lengths, strict=True):
                if within_limits(input_len, output_len) and len(found) < count:
                    found.append(Sample(prompt, input_len, output_len))
            if len(found) == count:
                break
        return found

    async def _lengths(self, prompt: str, answer: str) -> tuple[int, int]:
        """Tokens of a turn; none, which is below the limits, if the service takes no text as long."""
        try:
            asked = await self._tokens.encode(prompt, add_special_tokens=True)
            answered = await self._tokens.encode(answer)
        except TextRefused:
            return 0, 0
        return len(asked), len(answered)

    async def prompt(self, name: str, length: int, opening: str = "") -> str:
        """A text of `length` tokens, special ones included, that begins with `opening` as far as this fits.

        Prompts of different `name` have different words after the opening. Raises ConfigError.
        """
        wanted = length - self._special_tokens
        if wanted < 1:
            raise ConfigError(
                f"a prompt of {length} tokens has no room beside {self._special_tokens} special tokens; "
                "make it longer"
            )
        rng = random.Random(f"{self._seed}/{name}")
        text, ids = opening, await self._tokens.encode(opening) if opening else []
        for _ in range(_TRIES):
            if len(ids) == wanted:
                return text
            if len(ids) > wanted:
                text = await self._tokens.decode(ids[:wanted])
            else:
                more = math.ceil(1.1 * (wanted - len(ids)) / self._tokens_per_word)
                text = f"{text} {_words(rng, more)}" if text else _words(rng, more)
            ids = await self._tokens.encode(text)
        raise ConfigError(
            f"the tokenizer gave no text of exactly {wanted} tokens in {_TRIES} tries; use another length"
        )

    def _block(self, hash_id: int) -> str:
        """About `HASH_BLOCK` tokens that depend on the id and the seed alone."""
        count = max(1, math.floor(HASH_BLOCK / self._tokens_per_word))
        return _words(random.Random(f"{self._seed}/block/{hash_id}"), count)


def _words(rng: random.Random, count: int) -> str:
    return " ".join(
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(*_LETTERS))) for _ in range(count)
    )
