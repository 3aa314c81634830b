"""A move of experts on a card that computes nothing: all of it is on the card, and the steps' host does not wait."""

from __future__ import annotations

import json

import pytest

from qwen3_dist.ops.cpu import build
from tests.forks import Forks

INT8, FP8 = ["--quantize", "int8"], ["--quantize", "fp8"]


@pytest.mark.parametrize("options", [[], FP8, pytest.param(INT8, marks=pytest.mark.slow)])
def test_experts_that_arrive_on_a_card_make_no_step_wait(fake_cards: Forks, options: list[str]) -> None:
    if build.library() is None:
        pytest.skip("no C++ compiler is here")  # of which torch without CUDA needs a few lines
    seen = json.loads(fake_cards.run("tests.fake_gpu_moves", *options))
    assert seen == {"read": [], "move": []}
