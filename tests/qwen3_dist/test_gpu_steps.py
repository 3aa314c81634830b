"""Whole steps of a rank on a card that computes nothing: they compile, they are few launches, and nothing waits."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from qwen3_dist.ops.cpu import build
from tests.fake_gpu import CARD_BYTES, LAYERS
from tests.forks import Forks

WAYS = {
    "dense": ["dense"],
    "dense-int8-ampere": ["dense", "--quantize", "int8", "--card", "80"],
    "dense-fp8-cache-ampere": ["dense", "--fp8-cache", "--card", "80"],
    "dense-fp8": ["dense", "--quantize", "fp8"],
    "moe": ["moe"],
    "moe-ampere": ["moe", "--card", "80"],  # where torch's grouped_mm is a loop on the host
    "moe-int8": ["moe", "--quantize", "int8"],
    "moe-fp8-sharded": ["moe", "--quantize", "fp8", "--layout", "tp=4,ep=2"],  # etp=2 cuts blocks
    "moe-awq": ["moe", "--quantize", "awq"],
    "moe-nvfp4-ampere": ["moe", "--quantize", "nvfp4", "--card", "80"],
    "moe-fp8-deterministic": ["moe", "--quantize", "fp8", "--deterministic"],
    "moe-fp32": ["moe", "--dtype", "float32"],
    "moe-sharded": ["moe", "--layout", "tp=2,ep=2"],
    "moe-tp8": ["moe", "--layout", "tp=8"],
    "moe-wide": ["moe", "--layout", "dp=8,ep=8"],
    "moe-wide-all-to-all": ["moe", "--layout", "dp=8,ep=8", "--dispatch", "all_to_all"],
    "moe-mixed-all-to-all": ["moe", "--layout", "tp=4,dp=2,ep=4", "--dispatch", "all_to_all"],  # etp=2
    "moe-first-stage": ["moe", "--layout", "pp=2"],
    "moe-last-stage": ["moe", "--layout", "pp=2", "--stage", "1"],
    "moe-deterministic": ["moe", "--layout", "tp=2,ep=2", "--deterministic"],
    "moe-deterministic-all-to-all": [  # etp=2
        *("moe", "--layout", "tp=4,dp=2,ep=4", "--dispatch", "all_to_all", "--deterministic")
    ],
}


SLOW = (
    "moe-int8",
    "moe-awq",
    "moe-nvfp4-ampere",
    "moe-fp8-deterministic",
    "moe-fp32",
    "moe-tp8",
    "moe-wide",
    "moe-mixed-all-to-all",
    "moe-first-stage",
    "moe-deterministic-all-to-all",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS],
)
def phases(request: pytest.FixtureRequest, fake_cards: Forks) -> dict[str, dict[str, Any]]:
    if build.library() is None:
        pytest.skip("no C++ compiler is here, with which torch without CUDA is made to have a card")
    seen = json.loads(fake_cards.run("tests.fake_gpu", *WAYS[request.param]))
    assert isinstance(seen, dict)
    by_all_to_all = "aten.scatter_.src" in seen["decodes without graphs"]["operators"]  # of rows into slots
    assert by_all_to_all is ("all-to-all" in request.param)
    return seen


def launches(phase: dict[str, Any]) -> int:
    return sum(phase["kernels"].values()) + sum(phase["operators"].values())


def is_deterministic(phases: dict[str, dict[str, Any]]) -> bool:
    return "_log_softmax" in phases["sampled"]["kernels"]


def test_no_step_makes_the_host_wait(phases: dict[str, dict[str, Any]]) -> None:
    for name, phase in phases.items():
        if name != "start":
            assert not phase["waits"], name


def test_constants_reach_the_card_once_and_before_graphs_are_captured(
    phases: dict[str, dict[str, Any]],
) -> None:
    waits = Counter(phases["start"]["waits"])
    assert all(count <= LAYERS for count in waits.values()), waits


def test_decodes_are_one_graph(phases: dict[str, dict[str, Any]]) -> None:
    assert phases["start"]["kernels"]
    phase = phases["decodes"]
    assert not phase["kernels"] and "aten.mm.default" not in phase["operators"]
    assert launches(phase) < 15  # that hand it its inputs and take its tokens


def test_a_draw_is_few_launches(phases: dict[str, dict[str, Any]]) -> None:
    """Of three rows, each drawn in a way of its own, one with log-probabilities; plain torch takes 100 for two."""
    most = 45 + 10 * is_deterministic(phases)  # equal log-probabilities in the order of token ids
    assert launches(phases["sampled"]) - launches(phases["decodes"]) < most
    assert phases["sampled"]["kernels"].get("_draw", 0) == phases["start"]["draws"]


def test_a_block_is_few_launches(phases: dict[str, dict[str, Any]]) -> None:
    """Those of plain torch are four times as many. All-to-all takes fifty more to find slots, pack and unpack rows."""
    phase = phases["decodes without graphs"]
    most = 90 if "aten.scatter_.src" in phase["operators"] else 26
    most += 25 * is_deterministic(phases)  # ranks exchange twice for a product, and pairs are not one kernel
    assert launches(phase) - launches(phases["decodes"]) < most * LAYERS
    assert {"_norm", "_rotate", "_attend"} <= set(phase["kernels"])


def test_a_step_takes_no_more_memory_than_the_cache_leaves_it(phases: dict[str, dict[str, Any]]) -> None:
    """And not so much less that what is left for it would be wasted."""
    largest, start = phases["largest"]["bytes"], phases["start"]
    left = int(0.9 * CARD_BYTES) - start["weights_bytes"] - start["cache_bytes"]
    assert largest < left < 4 * largest


def test_codes_stay_codes(phases: dict[str, dict[str, Any]]) -> None:
    """No step makes a weight of them: its tensors of floats are of 2 rows, or of 49."""
    weights = {tuple(shape) for shape in phases["start"]["codes"]}
    for name in ("prompts", "prompts without graphs", "decodes without graphs"):
        assert not weights.intersection(map(tuple, phases[name]["floats"])), name
        assert bool(phases[name]["kernels"].get("_coded")) is bool(weights)
