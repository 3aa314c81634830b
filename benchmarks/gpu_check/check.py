"""Types for the modules of stages: planned checks, their settings, and how they fail or are skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class CheckFailed(Exception):
    """A check failed. The message says what was observed and what was expected."""

    def __init__(self, why: str, /, **figures: Any) -> None:
        super().__init__(why)
        self.figures = figures


class CheckSkipped(Exception):
    """A check or a whole stage cannot run on this machine. The message says what is missing."""


@dataclass(frozen=True)
class Setting:
    """Settings of all checks: device ("cpu" or "cuda"), directory of checkpoints, layers of the large model."""

    device: str
    folder: Path
    layers: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class PlannedCheck:
    """A check. `run` returns figures or raises. It is left out if fewer than `needs_s` seconds are left."""

    name: str
    run: Callable[[], Figures]
    needs_s: float = 5.0


def require(condition: bool, why: str, /, **figures: Any) -> None:
    """Raises CheckFailed unless `condition`."""
    if not condition:
        raise CheckFailed(why, **figures)
