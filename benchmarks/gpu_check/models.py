"""Models for checks: small random checkpoints with their reference, and Qwen3's shapes with random weights."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.checkpoints import SHAPES, write_checkpoint
from benchmarks.gpu_check.check import CheckFailed, Figures, Setting
from qwen3_dist.engine.engine import Engine
from qwen3_dist.layout import Layout
from qwen3_dist.model.reference import ReferenceModel, load_reference
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings

_SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16384,
}
_SMALL_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
KINDS = ("dense", "moe")
A3B = {  # Qwen3-30B-A3B
    **SHAPES["moe"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_hidden_layers": 48,
}
_TIE = 1e-3  # logits closer than this may swap order with the summation order in fp32


@dataclass
class Generated:
    """The output of one request: tokens, their log-probabilities, and cached prompt tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0


def small_shape(kind: str) -> dict[str, Any]:
    """The config.json of the small dense or MoE model."""
    return {**SHAPES[kind], **_SMALL, **(_SMALL_EXPERTS if kind == "moe" else {})}


def small_checkpoint(kind: str, setting: Setting) -> Path:
    """The directory of the small model's checkpoint, which all stages share."""
    return write_checkpoint(small_shape(kind), setting.folder / kind)


@functools.cache
def small_reference(kind: str, setting: Setting) -> ReferenceModel:
    """The unsharded reference of the small model, in fp32 on the CPU."""
    return load_reference(small_checkpoint(kind, setting))


def shape_only(name: str, shape: dict[str, Any], setting: Setting) -> Path:
    """A directory with only a config.json, for random weights."""
    folder = setting.folder / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@contextlib.contextmanager
def running(setting: Setting, model: Path, layout: str = "tp=1", **settings: Any) -> Iterator[Engine]:
    """A context with an engine of `model`, which can replace ranks. Several ranks run in processes, and share GPUs if
    there are too few."""
    world = Layout.parse(layout).world
    own: dict[str, Any] = {
        "model": str(model),
        "layout": layout,
        "device": setting.device,
        "executor": "in_process" if world == 1 else "processes",
        "step_timeout_s": 60.0,
        "start_timeout_s": 90.0,
        # Small limits: a GPU rank warms up and compiles kernels for all step sizes before it is ready.
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
    }
    if setting.on_gpu and world > torch.cuda.device_count():
        own["share_gpus"] = True
    if not setting.on_gpu:
        own["threads_per_rank"] = 1  # more threads would slow each other down on busy cores
    engine = Engine(read_settings(EngineConfig, own | settings), recovers=world > 1)
    try:
        yield engine
    finally:
        engine.shutdown()
        del engine
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Request:
    """A request that arrives before step `at` of the engine, counted from 0."""

    prompt: Sequence[int]
    params: SamplingParams
    at: int = 0


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], length: int, every: int = 0
) -> list[Generated]:
    """Generates `length` greedy tokens for each prompt. Prompts arrive `every` steps apart."""
    params = SamplingParams(temperature=0, logprobs=1, max_tokens=length, ignore_eos=True)
    return serve(engine, [Request(prompt, params, every * n) for n, prompt in enumerate(prompts)])


def serve(engine: Engine, requests: Sequence[Request]) -> list[Generated]:
    """Runs `requests`, which are in order of arrival, and returns their outputs."""
    made = [Generated() for _ in requests]
    waiting, steps = deque(enumerate(requests)), 0
    while waiting or engine.has_work:
        while waiting and (steps >= waiting[0][1].at or not engine.has_work):
            number, request = waiting.popleft()
            setup = engine.prepare(request.params)
            engine.add_request(str(number), list(request.prompt), request.params, setup=setup)
        for request_id, deltas in engine.step().items():
            for delta in deltas:
                of = made[int(request_id)]
                of.token_ids += delta.token_ids
                of.logprobs += delta.logprobs
                of.cached_tokens = max(of.cached_tokens, delta.num_cached_tokens)
        steps += 1
    engine.check_integrity()
    return made


def compare_with_reference(
    reference: ReferenceModel,
    prompts: Sequence[Sequence[int]],
    made: Sequence[Generated],
    max_error: float,
    greedy: bool,
) -> Figures:
    """Compares outputs with the reference. Raises CheckFailed if the mean error of a sequence's log-probabilities
    exceeds `max_error`, or, with `greedy`, if a token is not the reference's most likely one (ties aside)."""
    errors, largest, tied = [], 0.0, 0
    for number, (prompt, of) in enumerate(zip(prompts, made, strict=True)):
        logits = _logits(reference, (*prompt, *of.token_ids[:-1]), len(of.token_ids))
        chosen = torch.tensor(of.token_ids)[:, None]
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        off = (expected - torch.tensor([entry.logprob for entry in of.logprobs])).abs()
        errors.append(float(off.mean()))
        largest = max(largest, float(off.max()))
        if not errors[-1] <= max_error:  # also true for NaN
            raise CheckFailed(
                f"the log-probabilities of prompt {number} have a mean error of {errors[-1]:.3g}; at most "
                f"{max_error:g} is allowed"
            )
        behind = logits.max(1).values - logits.gather(1, chosen)[:, 0]
        tied += int((behind > 0).sum())
        if greedy and behind.max() > _TIE:
            at = int(behind.argmax())
            raise CheckFailed(
                f"token {at} of prompt {number} is {of.token_ids[at]}, and the reference's is "
                f"{int(logits[at].argmax())}, whose logit is larger by {float(behind[at]):.3g}"
            )
    figures: Figures = {
        "sequences": len(made),
        "mean_error": _rounded(max(errors)),
        "error": _rounded(largest),
    }
    return {**figures, "ties": tied} if greedy else figures


@functools.lru_cache(maxsize=256)
def _logits(reference: ReferenceModel, token_ids: tuple[int, ...], last: int) -> torch.Tensor:
    """The reference's logits [last, V] of the last positions. Cached, since correct layouts ask for the same ones."""
    return reference(torch.tensor(token_ids))[-last:].clone()


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def executor_of(engine: Engine) -> Any:
    """The engine's executor, a private attribute that checks need."""
    return engine._executor
