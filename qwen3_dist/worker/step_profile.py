"""Where the time of a rank's steps goes: seconds by operation, while a profile runs.

Kernels that compute a whole layer, stage or CUDA graph cannot be looked into. So a profile may take them apart: steps
then run operation by operation, as they do where there are no such kernels, and take longer. On a GPU times are those
between events of its stream, so an operation that the GPU waits for includes the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from qwen3_dist.model.block import TransformerBlock
from qwen3_dist.model.feed_forward import MoEFeedForward

if TYPE_CHECKING:
    from qwen3_dist.worker.runner import ModelRunner

SMALL, FUSED, REST = "norms, rope, residuals", "fused kernels", "step overhead"
TP = "tp all-reduce"
_COLLECTIVES = ("all_reduce", "add_all_reduced", "all_gather", "reduce_scatter")
_Replaced = tuple[Any, str, Callable[..., Any]]  # an object, its attribute, and what takes its place


class Timeline:
    """Exclusive seconds by name: at each time that of the innermost call that runs."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._running: list[str] = []
        self._marks: list[tuple[str, Any]] = []  # what has run up to this time; "" if nothing

    @property
    def running(self) -> str:
        return self._running[-1] if self._running else ""

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time counts for `name`."""

        def run(*arguments: Any, **options: Any) -> Any:
            self._mark()
            self._running.append(name)
            try:
                return call(*arguments, **options)
            finally:
                self._mark()
                self._running.pop()

        return run

    def seconds(self) -> dict[str, float]:
        """The seconds of each name so far. Waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, began), (name, ended) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                seconds = began.elapsed_time(ended) / 1e3 if self._on_gpu else ended - began
                found[name] = found.get(name, 0.0) + seconds
        return found

    def _mark(self) -> None:
        at: Any
        if self._on_gpu:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self._marks.append((self.running, at))


class StepProfile:
    """Times the steps of `runner` from its construction until `end`."""

    def __init__(self, runner: ModelRunner, apart: bool) -> None:
        self._timeline = Timeline(runner.model.device)
        self._steps = 0
        self._before: list[tuple[Any, str, bool, Any]] = []
        if apart:
            self._replace(runner, "_graphs", None)
            self._replace(runner.model, "whole_stage", None)
            for block in runner.model.blocks:
                for name in ("attend", "transform"):
                    self._replace(block, name, getattr(block, name))
                block.use(block.ff)  # without kernels of whole sublayers
        for owner, attribute, name in _operations(runner):
            self._time(owner, attribute, name)
        parallel = runner.model.parallel
        for group in {parallel.tp, parallel.dp, parallel.ep, parallel.etp}:
            for attribute in _COLLECTIVES if group.size > 1 else ():
                self._replace(group, attribute, self._over_tp(getattr(group, attribute)))
        launch = self._timeline.timed(REST, runner.launch)

        def counted(plan: Any) -> Any:
            self._steps += 1
            return launch(plan)

        self._replace(runner, "launch", counted)

    def end(self) -> tuple[int, dict[str, float]]:
        """The number of steps and their seconds by operation. Everything is as it was before the profile."""
        found = self._steps, self._timeline.seconds()
        for owner, attribute, was_own, value in reversed(self._before):
            if was_own:
                setattr(owner, attribute, value)
            else:
                delattr(owner, attribute)
        return found

    def _time(self, owner: Any, attribute: str, name: str) -> None:
        call = getattr(owner, attribute)
        if call is not None:
            self._replace(owner, attribute, self._timeline.timed(name, call))

    def _over_tp(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """A collective between two sublayers is tp's; within an operation it is a part of that."""
        over_tp = self._timeline.timed(TP, collective)

        def run(*arguments: Any) -> Any:
            return (over_tp if self._timeline.running == SMALL else collective)(*arguments)

        return run

    def _replace(self, owner: Any, attribute: str, value: Any) -> None:
        own = vars(owner)
        self._before.append((owner, attribute, attribute in own, own.get(attribute)))
        setattr(owner, attribute, value)


class ProfiledSteps:
    """What a `ModelRunner` is asked of profiles."""

    _profile: StepProfile | None = None

    def start_profile(self: Any, apart: bool) -> None:
        """Times the steps from now on, `apart` without kernels that compute several operations."""
        self._profile = StepProfile(self, apart)

    def end_profile(self) -> tuple[int, dict[str, float]]:
        """As `StepProfile.end`."""
        assert self._profile is not None, "start_profile comes first"
        found = self._profile.end()
        self._profile = None
        return found


def _operations(runner: ModelRunner) -> Iterator[tuple[Any, str, str]]:
    """Calls and the names of what they do, which are those of `CostModel.step_parts` where it has the operation."""
    model = runner.model
    if model.whole_stage is not None:
        yield model, "whole_stage", FUSED
    if runner._graphs is not None:
        yield runner._graphs, "run", FUSED
    yield runner, "_draw", "sampling"
    yield model.ops, "attention", "attention"
    yield model.ops, "rotate_and_store", SMALL
    stage = model.parallel.pipeline
    if stage.size > 1:
        yield stage, "send", "stage send"
        yield stage, "receive", "pipeline"
    if stage.is_first:
        yield model.tok_emb, "forward", "embedding"
    if stage.is_last:
        yield model, "logits", "head"
    for block in model.blocks:
        yield from _operations_of_block(block)


def _operations_of_block(block: TransformerBlock) -> Iterator[tuple[Any, str, str]]:
    yield block, "forward", SMALL
    yield block, "feed_forward", SMALL
    yield block.norm1, "forward", SMALL
    yield block.norm2, "forward", SMALL
    yield block.att.qkv, "products", "attention projections"
    yield block.att.out_proj, "forward", "attention projections"
    ff = block.ff
    if not isinstance(ff, MoEFeedForward):
        yield ff, "forward", "dense FFN"
        return
    yield ff, "gathered", "dispatch"
    yield ff, "dispatched", "dispatch"
    yield ff, "route", "router"
    yield ff.experts, "forward", "experts"
    yield ff.experts, "contributions", "experts"
