"""CUDA graphs change no result, and no kernel is compiled once an engine is ready."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_check.check import Figures, PlannedCheck, Setting, require
from benchmarks.gpu_check.models import (
    Generated,
    Request,
    executor_of,
    generate,
    running,
    serve,
    small_checkpoint,
)
from qwen3_dist.engine.engine import Engine
from qwen3_dist.launch.processes import shared_nursery
from qwen3_dist.sampling_params import SamplingParams

_BATCHES = (1, 2, 3, 5, 8, 17, 33)
MAX_DIFFERENCE = 1e-3  # of log-probabilities in fp32


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    for kind in ("dense", "moe"):
        yield PlannedCheck(f"{kind}, decodes as without graphs", _comparison(setting, kind), 15)
    for kind, quantize in (("dense", "none"), ("moe", "none"), ("moe", "int8")):
        named = f"{kind}, {'bfloat16' if quantize == 'none' else quantize}, no kernel compiled after Ready"
        yield PlannedCheck(named, _compiles(setting, kind, "tp=1", quantize), 15)
    with shared_nursery():
        named = "moe, bfloat16, tp=2,ep=2, no kernel compiled after Ready"
        yield PlannedCheck(named, _compiles(setting, "moe", "tp=2,ep=2", "none"), 15)


def _comparison(setting: Setting, kind: str) -> Any:
    return lambda: as_without_graphs(setting, kind, "tp=1", _BATCHES if setting.on_gpu else _BATCHES[:4])


def as_without_graphs(setting: Setting, kind: str, layout: str, batches: Sequence[int]) -> Figures:
    """Compares batches with and without graphs in fp32. With tp=1 also counts the replays."""
    length = 16 if setting.on_gpu else 6
    rng = random.Random(3)
    work = [[[rng.randrange(1000) for _ in range(rng.randint(1, 60))] for _ in range(b)] for b in batches]
    made: dict[bool, list[list[Generated]]] = {}
    figures: Figures = {"batches": list(batches)}
    for graphs in (True, False):
        settings: dict[str, Any] = {
            "dtype": "float32",
            "cuda_graphs": graphs,
            "num_blocks": 512,
            "max_model_len": 256,
            "max_num_seqs": max(batches),
        }
        with running(setting, small_checkpoint(kind, setting), layout, **settings) as engine:
            replays = 0
            if graphs:
                figures["backends"] = engine.backends
            made[graphs] = []
            for prompts in work:
                with _counted_replays() as counted:
                    made[graphs].append(generate(engine, prompts, length))
                replays += counted.call_count
        if setting.on_gpu and layout == "tp=1":
            expected = len(batches) * (length - 1) if graphs else 0
            figures["replays" if graphs else "replays_without"] = replays
            least = replays >= expected if graphs else replays == 0
            require(least, f"{replays} graphs were replayed with cuda_graphs={graphs}; expected {expected}")
    apart = max(_apart(a, b) for a, b in zip(made[True], made[False], strict=True))
    most = MAX_DIFFERENCE
    require(apart <= most, f"log-probabilities differ by up to {apart:.3g}; at most {most:g} is allowed")
    return {**figures, "apart": float(f"{apart:.3g}")}


def _apart(ones: Sequence[Generated], others: Sequence[Generated]) -> float:
    """The largest difference of log-probabilities, up to and including the first token that differs (a tie)."""
    most = 0.0
    for one, other in zip(ones, others, strict=True):
        pairs = zip(one.logprobs, other.logprobs, strict=True)
        for a, b in pairs:
            most = max(most, abs(a.logprob - b.logprob))
            if a.token_id != b.token_id:
                break
    return most


@contextlib.contextmanager
def _counted_replays() -> Iterator[mock.Mock]:
    if not torch.cuda.is_available():
        yield mock.Mock(call_count=0)
        return
    replay = torch.cuda.CUDAGraph.replay
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=replay) as counted:
        yield counted


def _compiles(setting: Setting, kind: str, layout: str, quantize: str) -> Any:
    def run() -> Figures:
        settings = {"dtype": "bfloat16", "quantize": quantize, "num_blocks": 1024, "max_model_len": 1024}
        with running(
            setting, small_checkpoint(kind, setting), layout, max_num_batched_tokens=512, **settings
        ) as engine:
            before = compiled_kernels(engine)
            requests = random_requests(48 if setting.on_gpu else 10)
            serve(engine, requests)
            steps, after = engine.stats().steps, compiled_kernels(engine)
        figures: Figures = {"compiled_before_ready": before, "steps": steps}
        more = [b - a for a, b in zip(before, after, strict=True)]
        require(not any(more), f"{more} kernels were compiled on each rank while serving", **figures)
        return figures

    return run


def compiled_kernels(engine: Engine) -> list[int]:
    """Number of Triton kernel variants that each rank has compiled so far."""
    counts: list[int] = executor_of(engine).call("compiled_kernels")
    return counts


def random_requests(count: int) -> list[Request]:
    """Requests of 1 to 900 prompt tokens, most of them short, with random arrivals and varied sampling parameters."""
    rng = random.Random(4)
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.7, "min_p": 0.05, "logprobs": 3},
        {"temperature": 0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"temperature": 0.6, "prompt_logprobs": 1},
        {"temperature": 1.0, "n": 3},
    ]
    requests, at = [], 0
    for number in range(count):
        at += rng.choice((0, 0, 1, 2, 7))
        length = int(900 ** rng.random())
        params = SamplingParams(**ways[number % len(ways)], max_tokens=rng.randint(1, 24), ignore_eos=True)
        requests.append(Request([rng.randrange(1000) for _ in range(length)], params, at))
    return requests
