"""Sets up the loggers of a Serve replica's process: which lines go to its log file, and in which form."""

from __future__ import annotations

import logging

from serve_app.settings import TelemetrySettings
from serve_app.telemetry.formats import formatter

SERVE = logging.getLogger("ray.serve")
LIBRARY = logging.getLogger("qwen3_dist")


def configure_logs(settings: TelemetrySettings, process: str) -> None:
    """Sends the records of `qwen3_dist` to Serve's log file of this process, named `process` in each line.

    Serve's own lines there get the same form. What Serve writes to standard error, which `qwen3-dist serve` shows in
    its terminal, stays as it is, and warnings of `qwen3_dist` go there too.
    """
    form = formatter(settings.log_format, process)
    for handler in SERVE.handlers:
        target = getattr(handler, "target", None) or handler  # Serve's file has a MemoryHandler before it
        if hasattr(target, "baseFilename"):
            target.setFormatter(form)
        else:
            handler.setLevel(logging.WARNING)
        if handler not in LIBRARY.handlers:
            LIBRARY.addHandler(handler)
    LIBRARY.propagate = False
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    LIBRARY.setLevel(level)
    SERVE.setLevel(max(level, logging.WARNING))  # its INFO has a line for each call between our processes
