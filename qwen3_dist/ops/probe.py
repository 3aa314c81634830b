"""Tests kernels at start, and logs why a kernel that fails or gives wrong results is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

_log = logging.getLogger(__name__)
_MOST_CHARACTERS = 500  # of a compiler's message


def failure(compute: Callable[[], Tensor], expected: Tensor, tolerance: float) -> str | None:
    """Returns why `compute` does not give `expected` within an absolute error of `tolerance`; None if it does."""
    try:
        error = (compute().float() - expected.float()).abs().max().item()
    except Exception as raised:  # a kernel can fail in any way
        return f"{type(raised).__name__}: {' '.join(str(raised).split())[:_MOST_CHARACTERS]}"
    if error <= tolerance:  # false for nan
        return None
    return f"its result is off by {error:.3g} where {tolerance:.3g} is allowed"


def log_failure(what: str, instead: str, reason: str) -> None:
    """Logs a warning that `what` is not used and `instead` is. Callers cache their result, so it appears once."""
    _log.warning("%s cannot be used here, so %s: %s", what, instead, reason)
