"""Every layout and dtype gives the unsharded reference's tokens and log-probabilities.

Ranks of a layout share the card where there are fewer cards; `nccl` repeats the layouts with a card for each rank.
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
MOST_ERROR = {
    "float32": 1e-3,
    "bfloat16": 0.15,
    "int8": 0.25,
}  # of log-probabilities, in the mean of a sequence


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
        # What comes last is left out first where kernels had to be compiled.
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
    """One run of the small model against its reference. Raises CheckFailed."""
    settings = {"num_blocks": 128, "max_model_len": 1024, **settings}
    path, reference = small_checkpoint(kind, setting), small_reference(kind, setting)
    with running(setting, path, layout, **settings) as engine:
        made = generate(engine, prompts, length, every)
        over = engine.collectives
    accuracy = "int8" if settings.get("quantize") == "int8" else settings["dtype"]
    figures = compare_with_reference(
        reference, prompts, made, MOST_ERROR[accuracy], greedy=accuracy == "float32"
    )
    return figures if layout == "tp=1" else {**figures, "collectives": over}


def _parity(setting: Setting, kind: str, layout: str, **settings: Any) -> PlannedCheck:
    length = 24 if setting.on_gpu else 8
    return PlannedCheck(
        _named(kind, layout, settings), lambda: parity(setting, kind, layout, length=length, **settings), 8
    )


def _mixed(setting: Setting, kind: str, layout: str) -> PlannedCheck:
    """Prompts arrive while others decode, and long ones go in chunks beside them."""
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
    """Prompts that begin alike, the later ones with what the cache holds of the first."""

    def run() -> Figures:
        begin = PROMPTS[0][:160]
        first, later = [begin + [5, 6, 7]], [begin + [8], begin + [9, 9], begin + [5, 6, 7]]
        path, reference = small_checkpoint(kind, setting), small_reference(kind, setting)
        with running(setting, path, dtype="float32", num_blocks=128, max_model_len=1024) as engine:
            made = generate(engine, first, 8) + generate(engine, later, 8)
        cached = [each.cached_tokens for each in made]
        require(cached[0] == 0 and min(cached[1:]) >= 160, f"tokens found in the cache are {cached}")
        figures = compare_with_reference(reference, first + later, made, MOST_ERROR["float32"], greedy=True)
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
