"""Faults and bad input: the error names the cause, arrives within seconds, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_check import planted
from benchmarks.gpu_check.check import CheckFailed, CheckSkipped, Figures, PlannedCheck, Setting, require
from benchmarks.gpu_check.models import generate, running, shape_only, small_checkpoint, small_shape
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import QwenDistError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.sampling_params import SamplingParams

_ERROR_WITHIN_S = 15.0
_ENDS_WITHIN_S = 10.0
_KEPT_BYTES = 256 << 20  # of GPU memory that a CUDA context may keep
_PROMPT = list(range(3, 60))


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    fault = partial(a_rank_fails, setting, "tp=2")
    yield PlannedCheck("a rank runs out of memory", partial(fault, "out of memory"), 15)
    yield PlannedCheck("a rank is killed", partial(fault, "killed"), 15)
    yield PlannedCheck("a killed rank is replaced", partial(a_rank_is_replaced, setting, "tp=2"), 40)
    yield PlannedCheck("a clean end leaves nothing", partial(_clean_end, setting, "tp=2"), 15)
    yield PlannedCheck("a card that another process fills", partial(_full_card, setting), 15)
    for name, (settings, said) in _bad_settings(setting).items():
        yield PlannedCheck(f"bad input: {name}", partial(_refused, setting, settings, said), 10)
    yield PlannedCheck("bad input: no visible card", partial(_no_visible_card, setting), 15)
    yield PlannedCheck("bad input: prompts", partial(_bad_prompts, setting), 10)


def a_rank_fails(setting: Setting, layout: str, how: str) -> Figures:
    """Rank 1 fails in a step while others wait for it. The error must name the cause and arrive within seconds."""
    path = shape_only(f"fails-{layout}-{how}".replace(" ", "-"), small_shape("dense"), setting)
    rank_main = planted.runs_out_of_memory if how == "out of memory" else planted.is_killed
    (path / planted.TRIGGER).unlink(missing_ok=True)
    before = _Leftovers(setting)
    with (
        mock.patch.object(Launcher, "main", staticmethod(rank_main)),
        running(setting, path, layout, load_format="random", dtype="float32", num_blocks=64) as engine,
    ):
        generate(engine, [_PROMPT], 4)
        (path / planted.TRIGGER).touch()
        started = time.monotonic()
        try:
            generate(engine, [_PROMPT], 64)
        except QwenDistError as error:
            message, seconds = str(error), time.monotonic() - started
        else:
            raise CheckFailed("the engine went on although rank 1 had failed")
        ended = time.monotonic()
    stop_s = time.monotonic() - ended
    figures: Figures = {"arrived_s": round(seconds, 2), "stopped_s": round(stop_s, 2), "message": message}
    named = "memory" if how == "out of memory" else "rank 1"
    require(named in message, f"the error does not say {named!r}: {message}", **figures)
    late = f"the error arrived after {seconds:.1f} s; at most {_ERROR_WITHIN_S:g} s are allowed"
    require(seconds <= _ERROR_WITHIN_S, late, **figures)
    return {**figures, **before.require_nothing_left()}


def a_rank_is_replaced(setting: Setting, layout: str) -> Figures:
    """The last rank is killed and the others wait for it in a collective. They must keep their processes, a new rank
    must take its place, and tokens must be as before."""
    before = _Leftovers(setting)
    path = small_checkpoint("dense", setting)
    with running(setting, path, layout, dtype="float32", num_blocks=64) as engine:
        expected = generate(engine, [_PROMPT], 16)[0].token_ids
        pids = [rank.pid for rank in engine.ranks]
        os.kill(pids[-1], signal.SIGKILL)
        _message(lambda: generate(engine, [_PROMPT], 16))
        recovery = engine.recover("a rank was killed", replaces=True)
        kept = [rank.pid for rank in engine.ranks][:-1]
        again = generate(engine, [_PROMPT], 16)[0].token_ids
    figures: Figures = {"replaced_s": round(recovery.seconds, 2), "bytes_read": recovery.bytes_read}
    require(kept == pids[:-1], "ranks that were not lost were started anew", **figures)
    require(again == expected, "tokens differ after a rank was replaced", **figures)
    return {**figures, **before.require_nothing_left()}


def _clean_end(setting: Setting, layout: str) -> Figures:
    before = _Leftovers(setting)
    with running(setting, small_checkpoint("dense", setting), layout, num_blocks=64) as engine:
        generate(engine, [_PROMPT], 4)
        ended = time.monotonic()
    seconds = time.monotonic() - ended
    return {"stopped_s": round(seconds, 2), **before.require_nothing_left()}


class _Leftovers:
    """Records descendant processes and free GPU memory before a check, to find what it leaves behind."""

    def __init__(self, setting: Setting) -> None:
        self._on_gpu = setting.on_gpu
        if self._on_gpu:
            torch.zeros(1, device="cuda")  # this process's own context stays
        self._processes = descendants(os.getpid())
        self._free = torch.cuda.mem_get_info()[0] if self._on_gpu else 0

    def require_nothing_left(self) -> Figures:
        """Waits until the processes and memory of the check are gone. Raises CheckFailed after some seconds."""
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while True:
            left = descendants(os.getpid()) - self._processes
            if self._on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
            missing = self._free - torch.cuda.mem_get_info()[0] if self._on_gpu else 0
            if not left and missing <= _KEPT_BYTES:
                return {"left": "nothing"}
            if time.monotonic() > deadline:
                raise CheckFailed(f"{len(left)} processes and {missing >> 20} MiB of the card are left")
            time.sleep(0.1)


def descendants(pid: int) -> set[int]:
    """Ids of all running descendants of process `pid`."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue  # it has just ended
        found.update(children, *(descendants(child) for child in children))
    return found


def _full_card(setting: Setting) -> Figures:
    """An engine must refuse to start while another process holds the GPU's memory."""
    if not setting.on_gpu:
        raise CheckSkipped("there is no card")
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - (4 << 30)), dtype=torch.uint8, device="cuda")
    try:
        return _refused(setting, {"executor": "processes", "num_blocks": None}, "memory")
    finally:
        del held
        torch.cuda.empty_cache()


def _bad_settings(setting: Setting) -> dict[str, tuple[dict[str, Any], str]]:
    """Bad settings by name, each with a word that the error must contain."""
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "a layout that does not divide": ({"layout": "tp=3"}, "tp="),
        "ep of a dense model": ({"layout": "tp=2,ep=2"}, "dense"),
        "a setting that is unknown": ({"sharing": True}, "sharing"),
        "a model that is not there": ({"model": str(setting.folder / "nowhere")}, "nowhere"),
        "a context longer than the cache": ({"max_model_len": 8192, "num_blocks": 4}, "max_model_len"),
    }
    if setting.on_gpu and torch.cuda.device_count() < 8:
        bad["more ranks than cards"] = ({"layout": "tp=8", "share_gpus": False}, "share_gpus")
    return bad


def _refused(setting: Setting, settings: dict[str, Any], said: str) -> Figures:
    """The engine must refuse to start with a one-sentence error that contains `said`.

    Tries twice, since the first try may load CUDA modules that stay in the process.
    """
    _why_it_does_not_start(setting, settings)
    before, started = _Leftovers(setting), time.monotonic()
    message = _why_it_does_not_start(setting, settings)
    figures: Figures = {"message": message, "told_s": round(time.monotonic() - started, 1)}
    require(said in message and "\n" not in message, f"not one sentence about {said!r}: {message}", **figures)
    return {**figures, **before.require_nothing_left()}


def _why_it_does_not_start(setting: Setting, settings: dict[str, Any]) -> str:
    own = {"num_blocks": 64, "model": small_checkpoint("dense", setting), "layout": "tp=1", **settings}
    try:
        with running(setting, Path(own.pop("model")), own.pop("layout"), **own):
            pass
    except QwenDistError as error:
        return str(error)
    raise CheckFailed("the engine started")


def _no_visible_card(setting: Setting) -> Figures:
    code = "from qwen3_dist import LLM; LLM(MODEL, device='cuda', num_blocks=64, use_tqdm=False)"
    code = code.replace("MODEL", json.dumps(str(small_checkpoint("dense", setting))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    require(done.returncode != 0 and "ResourceError" in last, f"it should be refused, and it said: {last}")
    return {"message": last}


def _bad_prompts(setting: Setting) -> Figures:
    """The engine must refuse bad prompts and go on working."""
    prompts: dict[str, list[int]] = {"empty": [], "outside": [10**6], "too long": [1] * 400}
    messages: Figures = {}
    with running(
        setting, small_checkpoint("dense", setting), dtype="float32", num_blocks=64, max_model_len=256
    ) as engine:
        expected = generate(engine, [_PROMPT], 4)
        for name, prompt in prompts.items():
            messages[name] = _message(lambda prompt=prompt: _add(engine, prompt))
        require(not engine.has_work, "a refused prompt was queued")
        again = generate(engine, [_PROMPT], 4)
    require(again[0].token_ids == expected[0].token_ids, "tokens differ after prompts were refused")
    return messages


def _add(engine: Engine, prompt: list[int]) -> None:
    engine.add_request("refused", prompt, SamplingParams(max_tokens=4))


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except QwenDistError as error:
        return str(error)
    raise CheckFailed("what cannot work raised no error")
