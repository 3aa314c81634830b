"""Finds the file that a logger writes to, for error messages."""

from __future__ import annotations

import logging
import os
from pathlib import Path


def log_file(logger: logging.Logger) -> Path | None:
    """The first file that records of `logger` are written to; None if no handler up to the root has one."""
    current: logging.Logger | None = logger
    while current is not None:
        for handler in current.handlers:
            # A MemoryHandler writes to its target.
            name = getattr(getattr(handler, "target", None) or handler, "baseFilename", None)
            if name is not None and name != os.devnull:
                return Path(name)
        current = current.parent if current.propagate else None
    return None
