"""A GPU that computes nothing: what a rank asks of one, and where its host would have to wait for the answer.

Tensors have shapes, dtypes and a device but no numbers (torch's FakeTensorMode), and Triton compiles each kernel for a
real card, with the assembler that comes with it, and launches none. To be run by itself, since all of the process sees
the card: `python -m tests.fake_gpu MODEL [--quantize fp8] [--dtype float32] [--card 80]` prints what it saw as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qwen3_dist.parallel.context import ParallelContext
from tests.fake_watch import Watch

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
extern "C" void set_guard() { c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard); }
"""


class _Driver:
    """What Triton asks of a driver. Kernels are compiled for the card and counted."""

    def __init__(self, card: int, kernels: Counter[str]) -> None:
        from triton.backends.compiler import GPUTarget

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name = metadata.name

            def __call__(self, *args: Any) -> None:
                kernels[self.name] += 1

        self.launcher_cls = Launcher
        self.get_current_target = lambda: GPUTarget("cuda", card, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 101_376}  # of the smaller cards

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


@functools.cache
def prepare() -> None:
    """Gives a build of torch without CUDA a device guard for it: not even tensors without numbers do without. And has
    Triton read its own files, by whose hash it keeps what it compiles.

    It takes three seconds. `tests.forks` does it before it forks.
    """
    from triton.runtime.cache import triton_key

    triton_key()
    if torch.cuda.is_available():
        return
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        where = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        options = ["-std=c++20", "-shared", "-fPIC"]
        compiler = shutil.which("g++") or "clang++"
        subprocess.run([compiler, *options, str(source), *where, "-lc10", "-o", str(built)], check=True)
        ctypes.CDLL(str(built)).set_guard()


@contextlib.contextmanager
def fake_gpu(card: int, watched: bool = True) -> Iterator[Watch]:
    """Makes `cuda` a card of compute capability `card`, e.g. 90, until it ends.

    Only kernels are counted unless it is `watched`, which takes time.
    """
    from triton.runtime.driver import driver

    prepare()
    watch = Watch()
    driver.set_active(_Driver(card, watch.kernels))  # type: ignore[no-untyped-call]

    class Anything:
        """A stream, an event, a graph, or a context of one."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    class Properties:
        multi_processor_count = 108

    fakes = dict.fromkeys(
        ("Stream", "stream", "current_stream", "Event", "CUDAGraph", "graph", "synchronize"), Anything
    )
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, fake))
        capability = divmod(card, 10)
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: capability))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda *_: Properties))
        stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda *_: f"a card of sm_{card}"))
        stack.enter_context(patch.object(torch.cuda, "device_count", lambda: 1))
        stack.enter_context(patch.object(torch.cuda, "set_device", lambda device: None))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", _address))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda self: self))
        stack.enter_context(FakeTensorMode())
        if watched:
            stack.enter_context(watch)
        yield watch


def _address(x: Tensor) -> int:
    """As a card's allocator gives it: memory begins at a multiple of 512 bytes, and views of it where they begin."""
    return (1 << 20) + x.storage_offset() * x.element_size()


def connected(layout: str, stage: int = 0, deterministic: bool = False) -> ParallelContext:
    """The first rank of a layout's `stage`; the other ranks are not there, and answer at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from qwen3_dist.layout import Layout

    if layout == "tp=1":
        return ParallelContext.single(deterministic)
    start = dist.init_process_group
    with patch.object(dist, "init_process_group", lambda _, **options: start("fake", **options)):
        parsed = Layout.parse(layout)
        where = parsed, stage * parsed.stage_size, FakeStore(), torch.device("cuda")
        return ParallelContext.connect(*where, deterministic=deterministic)


def observe(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What a rank's phases ask of the card: operators and kernels by name, and where its host waits."""
    from benchmarks.compare.checkpoints import SHAPES
    from qwen3_dist.config import ModelConfig
    from qwen3_dist.layout import Layout
    from qwen3_dist.pooling_params import PoolingParams
    from qwen3_dist.protocol.step_plan import PromptLogprobsSpec, SampleSpec, SequenceStep, StepPlan
    from qwen3_dist.settings import EngineConfig
    from qwen3_dist.worker import kv_cache
    from qwen3_dist.worker.runner import ModelRunner
    from qwen3_dist.worker.shard import MemoryShare, count_blocks
    from tests.fake_rank import built_model, weights_of_codes, without_numbers
    from tests.setups import setup

    layout, quantize, dispatch = asked.layout, asked.quantize, asked.dispatch
    config = ModelConfig.from_dict({**SHAPES[asked.model], "num_hidden_layers": LAYERS})
    greedy = SampleSpec(0.0, 1.0, 0, 0, 40, None)
    drawn = [
        greedy._replace(temperature=0.7, top_p=0.9, logprobs=3),
        greedy._replace(temperature=1.0, top_k=20),
        greedy._replace(temperature=1.0),
    ]
    penalties: dict[str, Any] = {"repetition_penalty": 1.2, "logit_bias": ((5, 1.0),), "min_p": 0.1}
    penalised = setup(**penalties, min_tokens=9, bad_words=((7,),), prompt=(1, 2))
    prompt = tuple(range(40))

    def plan(*parts: SequenceStep) -> StepPlan:
        """In every dp group the same."""
        return StepPlan.for_groups(1, [parts] * Layout.parse(layout).dp)[0]

    def step(slot: int, tokens: tuple[int, ...], start: int, **more: Any) -> SequenceStep:
        return SequenceStep(
            slot,
            slot,
            tokens,
            start,
            **{"new_blocks": (slot, 2 + slot, 4 + slot), "sample": greedy, **more},
        )

    prompts = plan(step(0, prompt, 0), step(1, prompt[:9], 0))
    decodes = plan(*(step(slot, (-1,), 40) for slot in range(2)))
    sampled = plan(*(step(slot, (-1,), 40, sample=spec) for slot, spec in enumerate(drawn)))
    formed = plan(step(0, (-1,), 40, setup=penalised), step(1, (-1,), 40))
    with_prompt_requests = plan(
        step(0, prompt, 0, prompt_request=PromptLogprobsSpec(0, (1,) * 39, 2)),
        step(1, prompt, 0, sample=None, prompt_request=PoolingParams()),
    )
    largest = plan(
        *(
            step(
                seq,
                (-1,),
                40,
                setup=penalised,
                sample=greedy._replace(temperature=1.0, top_p=0.9, logprobs=3),
            )
            for seq in range(DRAWS - 1)
        ),
        step(
            DRAWS - 1,
            tuple(range(TOKENS - DRAWS + 1)),
            0,
            new_blocks=tuple(range(TOKENS // 16)),
            prompt_request=PromptLogprobsSpec(0, (1,) * (TOKENS - DRAWS), 2),
        ),
    )
    phases: dict[str, dict[str, Any]] = {}
    with fake_gpu(asked.card) as watch, contextlib.ExitStack() as stack:
        stack.enter_context(without_numbers())

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            watch.restart()
            held = watch.bytes_held
            yield
            operators = {key: count for key, count in watch.operators.items() if count}
            phases[name] = {
                "operators": operators,
                "kernels": dict(watch.kernels),
                "waits": list(watch.waits),
                "floats": sorted(watch.floats),
                "bytes": watch.peak_bytes - held,
            }

        parallel = connected(layout, asked.stage, asked.deterministic)
        built = built_model(config, getattr(torch, asked.dtype), parallel, quantize)
        built.kv_cache_dtype = torch.float8_e4m3fn if asked.fp8_cache else None
        weights = watch.bytes_held
        memory = patch.object(torch.cuda, "mem_get_info", lambda _: (CARD_BYTES - weights, CARD_BYTES))
        with memory:
            sizes = EngineConfig(model="", block_size=1, max_num_batched_tokens=TOKENS, max_num_seqs=DRAWS)
            rounded = "int8" if quantize == "int8" else "none"
            sizes = replace(sizes, quantize=rounded, moe_dispatch=dispatch)
            blocks = count_blocks(sizes, built, MemoryShare())
        for graphs in (True, False):
            settings = EngineConfig(model="", block_size=16, cuda_graphs=graphs, max_model_len=TOKENS)
            settings = replace(settings, moe_dispatch=dispatch, max_num_seqs=4 if graphs else DRAWS)
            with phase("start" if graphs else "start without graphs"):
                runner = ModelRunner(built, 64, settings, path=Path())
            ending = "" if graphs else " without graphs"
            steps = {"prompts": prompts, "first decodes": decodes, "decodes": decodes, "sampled": sampled}
            for name, step_of in steps.items():
                with phase(name + ending):
                    runner.launch(step_of)
        others = {"formed": formed, "prompt outputs": with_prompt_requests, "largest": largest}
        for name, step_of in others.items():
            with phase(name):
                runner.launch(step_of)
    cache = blocks * kv_cache.block_bytes(built, 1)
    codes = {shape for layer in built.modules() for shape in weights_of_codes(layer)}
    drawn_here = built.parallel.pipeline.is_last
    phases["start"] |= {"weights_bytes": weights, "cache_bytes": cache, "draws": len(drawn) * drawn_here}
    phases["start"]["codes"] = sorted(codes)
    return phases


LAYERS = 2
TOKENS, DRAWS = 8192, 64  # of the largest step
CARD_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=("dense", "moe"))
    parser.add_argument("--card", type=int, default=90)
    parser.add_argument("--quantize")
    parser.add_argument("--layout", default="tp=1")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--dispatch", default="auto")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--fp8-cache", action="store_true")
    options = parser.parse_args()
    phases = observe(options)
    json.dump(phases, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
