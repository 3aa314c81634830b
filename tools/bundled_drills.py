"""Drills: short plain lines whose last part is learned, at a third of the tokens of a conversation.

They teach what conversations need most: sums, and copying words that were never seen before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from bundled_words import CITIES, FOODS, NAMES, held_out

if TYPE_CHECKING:
    from bundled_data import Maker

_TOPIC_WORDS = sorted({word for text in topics.values() for word in re.findall(r"\b[A-Za-z]{3,9}\b", text)})
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]


def drill(maker: Maker) -> tuple[str, str]:
    """What is given, and how it goes on."""
    kinds: dict[Callable[[Maker], tuple[str, str]], float]
    kinds = {_sum: 0.7, _repeat: 0.08, _recall: 0.12, _object: 0.1}
    return maker.rng.choices(list(kinds), list(kinds.values()))[0](maker)


def _sum(maker: Maker) -> tuple[str, str]:
    digits = maker.rng.choices((1, 2, 3), (0.05, 0.75, 0.2))[0]
    op = maker.rng.choice("+-")
    a, b, result = maker.operands(digits, op)
    return f"{a} {op} {b} =", f" {result}"


def _repeat(maker: Maker) -> tuple[str, str]:
    words = " ".join(_word(maker) for _ in range(maker.rng.randint(1, 5)))
    return f"Say {words}:", f" {words}"


def _recall(maker: Maker) -> tuple[str, str]:
    pairs = [(_word(maker), _value(maker)) for _ in range(maker.rng.randint(2, 5))]
    key, value = maker.rng.choice(pairs)
    return ", ".join(f"{key} {value}" for key, value in pairs) + f". {key}", f" {value}"


def _object(maker: Maker) -> tuple[str, str]:
    pairs = {_word(maker): _value(maker) for _ in range(maker.rng.randint(1, 3))}
    return " and ".join(f"{key} {value}" for key, value in pairs.items()) + ":", " " + json.dumps(pairs)


def _value(maker: Maker) -> str | int:
    return maker.rng.randint(0, 199) if maker.rng.random() < 0.3 else _word(maker)


def _word(maker: Maker) -> str:
    """A word of this side of the split: of the conversations, of Python's documentation, or of no language."""
    rng = maker.rng
    kind = rng.random()
    if kind < 0.3:
        return maker.pick(rng.choice((NAMES, CITIES, FOODS)))
    if kind < 0.8:
        while True:
            word = rng.choice(_TOPIC_WORDS)
            if not held_out(word):
                return word
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))
    return word.capitalize() if rng.random() < 0.5 else word
