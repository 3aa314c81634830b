"""Ranks with a planted fault, which strikes in the first step after a file TRIGGER appears in the model's
directory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.worker.rank import rank_main
from qwen3_dist.worker.runner import ModelRunner

TRIGGER = "fail-now"
_MORE_THAN_ANY_CARD = 1 << 50  # bytes


def runs_out_of_memory(spec: RankSpec) -> None:
    """Rank main function; rank 1 runs out of GPU memory."""
    _with_fault(spec, _run_out_of_memory)


def is_killed(spec: RankSpec) -> None:
    """Rank main function; rank 1 is killed in a step."""
    _with_fault(spec, _be_killed)


def _with_fault(spec: RankSpec, strike: Callable[[str], None]) -> None:
    if spec.rank == 1:
        trigger, launch = Path(spec.config.model) / TRIGGER, ModelRunner.launch

        def launch_or_fail(runner: ModelRunner, plan: Any) -> Any:
            if trigger.exists():
                strike(spec.device)
            return launch(runner, plan)

        ModelRunner.launch = launch_or_fail  # type: ignore[method-assign]  # only in this forked process
    rank_main(spec)


def _run_out_of_memory(device: str) -> None:
    if device == "cpu":  # a CPU allocation succeeds, since the kernel overcommits memory
        raise torch.OutOfMemoryError("a CPU rank was told to run out of memory")
    torch.empty(_MORE_THAN_ANY_CARD, dtype=torch.uint8, device=device)


def _be_killed(device: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
