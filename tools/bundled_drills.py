"""Drills: short lines of which the last part is learned, with a third of a conversation's tokens.

They teach what conversations need most: sums, and copying unseen words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bundled_data import Maker


def drill(maker: Maker) -> tuple[str, str]:
    """A random drill: the prompt, and the completion to learn."""
    kinds: dict[Callable[[Maker], tuple[str, str]], float]
    kinds = {_sum: 0.7, _repeat: 0.08, _recall: 0.12, _object: 0.1}
    return maker.rng.choices(list(kinds), list(kinds.values()))[0](maker)


def _sum(maker: Maker) -> tuple[str, str]:
    digits = maker.rng.choices((1, 2, 3), (0.05, 0.75, 0.2))[0]
    op = maker.rng.choice("+-")
    a, b, result = maker.operands(digits, op)
    return f"{a} {op} {b} =", f" {result}"


def _repeat(maker: Maker) -> tuple[str, str]:
    words = " ".join(maker.any_word() for _ in range(maker.rng.randint(1, 5)))
    return f"Say {words}:", f" {words}"


def _recall(maker: Maker) -> tuple[str, str]:
    pairs = [(maker.any_word(), _value(maker)) for _ in range(maker.rng.randint(2, 5))]
    key, value = maker.rng.choice(pairs)
    return ", ".join(f"{key} {value}" for key, value in pairs) + f". {key}", f" {value}"


def _object(maker: Maker) -> tuple[str, str]:
    pairs = {maker.any_word(): _value(maker) for _ in range(maker.rng.randint(1, 3))}
    return " and ".join(f"{key} {value}" for key, value in pairs.items()) + ":", " " + json.dumps(pairs)


def _value(maker: Maker) -> str | int:
    return maker.rng.randint(0, 199) if maker.rng.random() < 0.3 else maker.any_word()
