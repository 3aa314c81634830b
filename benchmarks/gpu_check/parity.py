"""Every layout and dtype gives the tokens and log-probabilities of the unsharded reference.

Ranks share GPUs if there are too few; `nccl` repeats layouts with a GPU for each rank.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu_check.check import Figures, PlannedCheck, Setting, require
from benchmarks.gpu_check.models import (
    KINDS,
    compare_with_reference,
    generate,
    running,
    small_checkpoint,
    small_reference,
)
from qwen3_dist.launch.processes import shared_nursery

PROMPTS = [list(range(3, 200)), [7, 1, 150, 198, 0], [42], list(range(100, 140))]
LAYOUTS = {
    "dense": ("tp=2", "pp=2"),
    "moe": ("tp=2,ep=2", "dp=2,ep=2", "tp=4,ep=2", "tp=2,pp=2,ep=2"),
}
MAX_ERROR = {
    "float32": 1e-3,
    "bfloat16": 0.15,
    "int8": 0.25,
}  # mean error of a sequence's log-probabilities


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    for kind in KINDS:
        yield _parity(setting, kind, "tp=1", dtype="float32")
        if setting.on_gpu:
            yield _parity(setting, kind, "tp=1", dtype="float32", cuda_graphs=False)
        yield _parity(setting, kind, "tp=1", dtype="bfloat16")
        yield _parity(setting, kind, "tp=1", dtype="bfloat16", quantize="int8")
    with shared_nursery():
        for kind in KINDS:
            yield _mixed(setting, kind, "tp=1")
            yield _prefixes(setting, kind)
            for layout in LAYOUTS[kind]:
                yield _parity(setting, kind, layout, dtype="float32")
        yield _parity(setting, "moe", "tp=2,ep=2", dtype="float32", moe_dispatch="all_to_all")
        yield _long(setting, "moe", "tp=2,ep=2", dtype="float32", max_num_batched_tokens=768)
        yield _long(setting, "dense", "tp=1", dtype="float32")
        yield _mixed(setting, "moe", "tp=2,ep=2")
        # The last checks are left out first if compiling kernels took too long.
        yield _parity(setting, "moe", "dp=2,ep=2", dtype="float32", moe_dispatch="all_to_all")
        yield _long(setting, "moe", "tp=1", dtype="bfloat16")
        yield _parity(setting, "moe", "tp=2,ep=2", dtype="bfloat16")
        yield _parity(setting, "moe", "tp=4,ep=4", dtype="float32")
        yield _parity(setting, "dense", "tp=4", dtype="float32")


def parity(
    setting: Setting,
    kind: str,
    layout: str,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    length: int = 24,
    every: int = 0,
    **settings: Any,
) -> Figures:
    """Compares a run of the small model with its reference. Raises CheckFailed."""
    settings = {"num_blocks": 128, "max_model_len": 1024, **settings}
    path, reference = small_checkpoint(kind, setting), small_reference(kind, setting)
    with running(setting, path, layout, **settings) as engine:
        made = generate(engine, prompts, length, every)
        over = engine.collectives
    accuracy = "int8" if settings.get("quantize") == "int8" else settings["dtype"]
    figures = compare_with_reference(
        reference, prompts, made, MAX_ERROR[accuracy], greedy=accuracy == "float32"
    )
    return figures if layout == "tp=1" else {**figures, "collectives": over}


def _parity(setting: Setting, kind: str, layout: str, **settings: Any) -> PlannedCheck:
    length = 24 if setting.on_gpu else 8
    return PlannedCheck(
        _named(kind, layout, settings), lambda: parity(setting, kind, layout, length=length, **settings), 8
    )


def _mixed(setting: Setting, kind: str, layout: str) -> PlannedCheck:
    """Prompts arrive while others decode; long prompts are prefilled in chunks."""
    rng = random.Random(0)
    lengths = (5, 300, 17, 64, 1, 200, 33, 129) if setting.on_gpu else (5, 150, 17, 33)
    prompts = [[rng.randrange(1000) for _ in range(length)] for length in lengths]
    more = {"dtype": "float32", "max_num_batched_tokens": 64, "num_blocks": 256}
    return PlannedCheck(
        f"{kind}, {layout}, prompts arrive while others decode",
        lambda: parity(setting, kind, layout, prompts, length=20, every=3, **more),
        8,
    )


def _prefixes(setting: Setting, kind: str) -> PlannedCheck:
    """Prompts with a shared prefix, which the later ones find in the cache."""

    def run() -> Figures:
        begin = PROMPTS[0][:160]
        first, later = [begin + [5, 6, 7]], [begin + [8], begin + [9, 9], begin + [5, 6, 7]]
        path, reference = small_checkpoint(kind, setting), small_reference(kind, setting)
        with running(setting, path, dtype="float32", num_blocks=128, max_model_len=1024) as engine:
            made = generate(engine, first, 8) + generate(engine, later, 8)
        cached = [each.cached_tokens for each in made]
        require(cached[0] == 0 and min(cached[1:]) >= 160, f"tokens found in the cache are {cached}")
        figures = compare_with_reference(reference, first + later, made, MAX_ERROR["float32"], greedy=True)
        return {**figures, "cached_tokens": cached}

    return PlannedCheck(f"{kind}, tp=1, cached prefixes", run)


def _long(setting: Setting, kind: str, layout: str, **settings: Any) -> PlannedCheck:
    """A context of thousands of tokens, decoded beside a short one."""
    tokens = 8192 if setting.on_gpu else 1024
    rng = random.Random(1)
    prompts = [[rng.randrange(1000) for _ in range(length)] for length in (tokens, 9)]
    return PlannedCheck(
        f"{_named(kind, layout, settings)}, context of {tokens}",
        lambda: parity(
            setting,
            kind,
            layout,
            prompts,
            length=8,
            max_model_len=tokens + 64,
            num_blocks=tokens // 16 + 32,
            **{"max_num_batched_tokens": tokens, **settings},
        ),
        15,
    )


def _named(kind: str, layout: str, settings: dict[str, Any]) -> str:
    said = [kind, layout, settings["dtype"]]
    said += ["without graphs"] if settings.get("cuda_graphs") is False else []
    said += [str(settings[key]) for key in ("quantize", "moe_dispatch") if key in settings]
    if "max_num_batched_tokens" in settings:
        said.append(f"chunks of {settings['max_num_batched_tokens']}")
    return ", ".join(said)
