"""What the modules of stages are written with: a check that is planned, and how it fails or is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class CheckFailed(Exception):
    """What a check saw is wrong; the message says what it saw and what it expected."""

    def __init__(self, why: str, /, **figures: Any) -> None:
        super().__init__(why)
        self.figures = figures


class CheckSkipped(Exception):
    """A check, or a whole stage, cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Setting:
    """Where checks run ("cpu" or "cuda"), the folder of their checkpoints, and layers of the large model."""

    device: str
    folder: Path
    layers: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class PlannedCheck:
    """`run` returns figures, or raises. It is left out where fewer than `needs_s` seconds are left."""

    name: str
    run: Callable[[], Figures]
    needs_s: float = 5.0


def require(condition: bool, why: str, /, **figures: Any) -> None:
    """Raises CheckFailed unless `condition`."""
    if not condition:
        raise CheckFailed(why, **figures)
