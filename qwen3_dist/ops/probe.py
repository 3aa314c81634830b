"""Tries of kernels at start: the log says why one that does not run here, or computes something else, is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

_log = logging.getLogger(__name__)
_MOST_CHARACTERS = 500  # of a compiler's message


def failure(compute: Callable[[], Tensor], expected: Tensor, tolerance: float) -> str | None:
    """Why `compute` does not give `expected`, up to an absolute error of `tolerance`; None if it does."""
    try:
        error = (compute().float() - expected.float()).abs().max().item()
    except Exception as raised:  # whatever it lacks here
        return f"{type(raised).__name__}: {' '.join(str(raised).split())[:_MOST_CHARACTERS]}"
    if error <= tolerance:  # which nan is not
        return None
    return f"its answer is off by {error:.3g} where {tolerance:.3g} is allowed"


def log_failure(what: str, instead: str, reason: str) -> None:
    """Warns that `instead` is used, once for each call: callers keep what they found."""
    _log.warning("%s cannot be used here, so %s: %s", what, instead, reason)
