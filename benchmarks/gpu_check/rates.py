"""Speed of the GPU on Qwen3's shapes (decode, mixed steps, long contexts), as shares of its limits.

Each rate comes with the host time of a step: planning, launching, waiting for the device.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.compare.limits import Machine, measure_gpu, row_limit
from benchmarks.compare.workload import Row
from benchmarks.gpu_check.check import CheckFailed, CheckSkipped, Figures, PlannedCheck, Setting
from benchmarks.gpu_check.models import A3B, executor_of, running, shape_only
from benchmarks.timing import host_seconds
from qwen3_dist.benchmark import Workload, measure, warm_up
from qwen3_dist.engine.engine import Engine
from qwen3_dist.sampling_params import SamplingParams

_ON_GPU = (Row(1, 32, 64), Row(32, 32, 64), Row(256, 32, 64), Row(8, 1024, 1), Row(8, 8192, 32))
_ON_CPU = (Row(1, 32, 4), Row(4, 32, 4), Row(2, 256, 1), Row(2, 512, 4))


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    yield PlannedCheck("the card's limits", lambda: _limits(setting))
    shapes = _shapes(setting)
    for name, shape in shapes.items():
        with _SharedEngine(setting, shape_only(name, shape, setting)) as engine:
            yield PlannedCheck(f"{name}, start", engine.started, engine.needs_s)
            for row in _ON_GPU if setting.on_gpu else _ON_CPU:
                yield PlannedCheck(f"{name}, {row}", functools.partial(_rate, engine, row), engine.needs_s)
            yield PlannedCheck(f"{name}, mixed steps", functools.partial(_mixed, engine), engine.needs_s)
    if setting.on_gpu:
        name = "Qwen3-0.6B"
        with _SharedEngine(setting, setting.folder / name, cuda_graphs=False) as engine:
            yield PlannedCheck(f"{name}, without graphs, start", engine.started, engine.needs_s)
            run = functools.partial(_rate, engine, _ON_GPU[1])
            yield PlannedCheck(f"{name}, without graphs, {_ON_GPU[1]}", run, engine.needs_s)
    for name, shape in shapes.items() if setting.on_gpu else [next(iter(shapes.items()))]:
        batches = (1,) if not setting.on_gpu or "num_experts" in shape else (1, 32)
        run = functools.partial(_transformers, shape, batches, setting)
        yield PlannedCheck(f"{name}, transformers", run, 25 if setting.on_gpu else 10)


def _shapes(setting: Setting) -> dict[str, dict[str, Any]]:
    if setting.on_gpu:
        return {
            "Qwen3-0.6B": SHAPES["dense"],
            f"Qwen3-30B-A3B, {setting.layers} layers": {**A3B, "num_hidden_layers": setting.layers},
        }
    return {
        f"{name}, 2 layers": {**SHAPES[kind], "num_hidden_layers": 2, "vocab_size": 8192}
        for name, kind in (("Qwen3-0.6B", "dense"), ("MoE of 64 experts", "moe"))
    }


@functools.cache
def _machine(setting: Setting) -> Machine:
    return measure_gpu() if setting.on_gpu else _one_core()


def _one_core() -> Machine:
    """Limits of one CPU thread, measured roughly: enough to see that the stage runs."""
    x, a, b = torch.ones(1 << 26), torch.randn(512, 1024), torch.randn(1024, 1024)
    products = 2 * 512 * 1024**2 / min(host_seconds(lambda: torch.mm(a, b), 5))
    return Machine(x.nbytes / min(host_seconds(x.sum, 5)), products)


def _limits(setting: Setting) -> Figures:
    machine = _machine(setting)
    return {
        "gb_per_s": round(machine.read_bytes_per_s / 1e9, 1),
        "tflops": round(machine.flops_per_s / 1e12, 2),
    }


class _SharedEngine:
    """One engine for several checks; the first check starts it."""

    def __init__(self, setting: Setting, model: Path, **settings: Any) -> None:
        self.setting = setting
        self._model, self._settings = model, settings
        self._open = contextlib.ExitStack()
        self._engine: Engine | None = None
        self._failure = ""

    def __enter__(self) -> _SharedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine = None
        self._open.close()

    @property
    def needs_s(self) -> float:
        """Seconds that the next check needs, including the start of the engine."""
        return 5 if self._engine is not None else 30 if self.setting.on_gpu else 10

    def get(self) -> Engine:
        """The engine. Raises CheckFailed if it failed to start in an earlier check."""
        if self._failure:
            raise CheckFailed(f"the engine did not start: {self._failure}")
        if self._engine is None:
            on_gpu = self.setting.on_gpu
            limits: dict[str, Any] = {"max_model_len": 8448 if on_gpu else 1024}
            limits |= {"max_num_seqs": 256 if on_gpu else 4, "max_num_batched_tokens": None}
            own = {"load_format": "random", "prefix_caching": False, **limits, **self._settings}
            try:
                self._engine = self._open.enter_context(running(self.setting, self._model, **own))
            except Exception as error:
                self._failure = f"{type(error).__name__}: {error}"
                raise
        return self._engine

    def started(self) -> Figures:
        """Starts the engine; seconds until it is ready and until the first tokens, and its backends."""
        started = time.perf_counter()
        engine = self.get()
        ready = time.perf_counter()
        warm_up(engine)
        first = time.perf_counter() - ready
        figures = {"ready_s": round(ready - started, 1), "first_tokens_s": round(first, 2)}
        return {**figures, "blocks": executor_of(engine).num_blocks, "backends": engine.backends}


def _rate(one: _SharedEngine, row: Row) -> Figures:
    engine = one.get()
    measure(engine, Workload(row.num_prompts, row.input_len, min(row.output_len, 2), seed=1))
    with _timed(engine) as spent:
        figures = measure(engine, Workload(row.num_prompts, row.input_len, row.output_len))
    kept = {key: figures[key] for key in ("ttft_ms", "itl_ms") if figures[key] is not None}
    seconds = row.num_prompts * row.output_len / figures["output_tokens_per_s"]
    share = row_limit(engine.model_config, row, _machine(one.setting)) / seconds
    what = "tokens_per_s" if row.output_len > 1 else "prompt_tokens_per_s"
    rate = {what: round(row.rate(seconds), 1), "of_limit": round(share, 3)}
    return {**rate, **kept, **spent.medians(), "preemptions": figures["preemptions"]}


def _mixed(one: _SharedEngine) -> Figures:
    """Prompts arrive, one every few steps, while others decode."""
    engine, on_gpu = one.get(), one.setting.on_gpu
    count, prompt_len, length = (48, 1024, 64) if on_gpu else (4, 64, 6)
    prompts = Workload(count, prompt_len, 1, seed=2).prompts(engine.model_config.vocab_size)
    params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
    last: dict[str, float] = {}
    gaps: list[float] = []
    started, tokens, added, steps = time.perf_counter(), 0, 0, 0
    with _timed(engine) as spent:
        while added < count or engine.has_work:
            if added < count and (steps % 2 == 0 or not engine.has_work):
                engine.add_request(str(added), prompts[added], params)
                added += 1
            for request_id, deltas in engine.step().items():
                now = time.perf_counter()
                tokens += sum(len(delta.token_ids) for delta in deltas)
                gaps += [now - last[request_id]] if request_id in last else []
                last[request_id] = now
            steps += 1
    seconds = time.perf_counter() - started
    return {
        "requests": f"{count}×({prompt_len}→{length})",
        "tokens_per_s": round(tokens / seconds, 1),
        "prompt_tokens_per_s": round(count * prompt_len / seconds, 1),
        "itl_ms": {"p50": _ms(statistics.median(gaps)), "most": _ms(max(gaps))},
        **spent.medians(),
    }


class _StepTimes:
    """Seconds of each step: in total, in the executor's `submit`, and in its `collect`."""

    def __init__(self) -> None:
        self.step: list[float] = []
        self.submit: list[float] = []
        self.collect: list[float] = []

    def medians(self) -> Figures:
        """Median microseconds of a step: total, scheduling, launching, and waiting for the device."""
        if not self.step:
            return {}
        step, submit, collect = map(statistics.median, (self.step, self.submit, self.collect))
        rest = max(0.0, step - submit - collect)
        named = {"in_all": step, "plan_and_update": rest, "launch": submit, "wait": collect}
        return {"step_us": {name: round(1e6 * seconds) for name, seconds in named.items()}}


@contextlib.contextmanager
def _timed(engine: Engine) -> Iterator[_StepTimes]:
    """A context that times the engine's steps."""
    executor, spent = executor_of(engine), _StepTimes()
    targets = ((engine, "step"), (executor, "submit"), (executor, "collect"))
    for target, name in targets:
        setattr(target, name, _timing(getattr(target, name), getattr(spent, name)))
    try:
        yield spent
    finally:
        for target, name in targets:
            delattr(target, name)  # restores the method of the class


def _timing(call: Any, into: list[float]) -> Any:
    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        answer = call(*arguments)
        into.append(time.perf_counter() - started)
        return answer

    return timed


def _transformers(shape: dict[str, Any], batches: tuple[int, ...], setting: Setting) -> Figures:
    """Decode rate of transformers' `generate`."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise CheckSkipped("transformers is not installed") from None
    torch.manual_seed(0)
    with torch.device(setting.device):
        config = AutoConfig.for_model(**shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    length = 64 if setting.on_gpu else 4
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    figures: Figures = {}
    for batch in batches:
        ids = torch.randint(1000, shape["vocab_size"], (batch, 32), device=setting.device)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{**options, "min_new_tokens": 2, "max_new_tokens": 2},
            )
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            rate = batch * length / (time.perf_counter() - started)
        figures[f"{Row(batch, 32, length)}, tokens_per_s"] = round(rate, 1)
    del model
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return figures


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
