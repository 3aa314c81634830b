"""Triton compiles nothing while a rank serves: over a thousand random steps on a card that computes nothing."""

from __future__ import annotations

import json

import pytest

from qwen3_dist.ops.cpu import build
from tests.forks import Forks

STEPS = 210  # of each
WAYS = {
    "dense-guesses": ["dense", "--guesses", "3"],
    "moe": ["moe"],
    "moe-int8-ampere": ["moe", "--quantize", "int8", "--card", "80"],
    "moe-fp8": ["moe", "--quantize", "fp8"],
    "moe-sharded": ["moe", "--layout", "tp=2,ep=2"],
    "moe-dp": ["moe", "--layout", "dp=2,ep=2", "--dispatch", "all_gather"],
    "moe-repeats": ["moe", "--layout", "dp=2,ep=2", "--dispatch", "all_to_all"],
}
MOST_VARIANTS = 40  # each takes about a second at a card's first start


EVERY_TIME = ("moe-sharded",)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way in EVERY_TIME else pytest.mark.slow) for way in WAYS]
)
def test_no_step_compiles_a_kernel_after_warm_up(fake_cards: Forks, way: str) -> None:
    if build.library() is None:
        pytest.skip("no C++ compiler is here, with which torch without CUDA is made to have a card")
    seen = json.loads(fake_cards.run("tests.fake_serving", *WAYS[way], "--steps", str(STEPS)))
    assert {"_attend", "_norm", "_draw"} <= set(seen["ready"])
    assert sum(seen["ready"].values()) <= MOST_VARIANTS, seen["ready"]
    assert not seen["late"]
