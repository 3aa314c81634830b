"""A move of experts on a card that computes nothing: all of it is on the card, and the steps' host does not wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qwen3_dist.ops.cpu import build
from tests.ranks import ROOT


@pytest.mark.parametrize("options", [[], pytest.param(["--quantize", "int8"], marks=pytest.mark.slow)])
def test_experts_that_arrive_on_a_card_make_no_step_wait(options: list[str]) -> None:
    if build.library() is None:
        pytest.skip("no C++ compiler is here")  # of which torch without CUDA needs a few lines
    command = [sys.executable, "-m", "tests.fake_gpu_moves", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"read": [], "move": []}
