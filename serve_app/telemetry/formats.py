"""The two forms of log lines. Both have the time in UTC, the level, the logger, the process and the message.

A record may carry `fields`, a mapping of names to values (`logger.info("...", extra={"fields": {...}})`), which follow
as `name=value` or as keys of the JSON object. A field that is None or empty is left out of text and null in JSON.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

import pydantic_core

_PLAIN = re.compile(r"[\w./:@#+-]+")
_LINE = "qwen3_dist_line"


class _Formatter(logging.Formatter):
    """Formats a record once: a rotating file asks for its length before it asks for the line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        made = record.__dict__.get(_LINE)
        if made is not None and made[0] is self:
            return str(made[1])
        line = self.line(record)
        record.__dict__[_LINE] = (self, line)
        return line

    def line(self, record: logging.LogRecord) -> str:
        raise NotImplementedError

    def traceback(self, record: logging.LogRecord) -> str:
        """The record's traceback; empty without one."""
        return self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""


class TextFormatter(_Formatter):
    """One line for a record, and the lines of its traceback."""

    def line(self, record: logging.LogRecord) -> str:
        words = [_utc(record.created), record.levelname, record.name, self._process, record.getMessage()]
        for name, value in _fields(record).items():
            if value is not None and value != "" and value != ():
                words.append(f"{name}={_text(value)}")
        trace = self.traceback(record)
        return " ".join(words) + (f"\n{trace}" if trace else "")


class JsonFormatter(_Formatter):
    """One JSON object for a record, in one line."""

    def line(self, record: logging.LogRecord) -> str:
        values = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            **_fields(record),
        }
        if trace := self.traceback(record):
            values["traceback"] = trace
        return pydantic_core.to_json(values, fallback=repr, inf_nan_mode="null").decode()


def formatter(form: str, process: str) -> logging.Formatter:
    """The formatter of `log_format` for the lines of `process`."""
    return JsonFormatter(process) if form == "json" else TextFormatter(process)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    if not fields and (request_id := getattr(record, "request_id", "")):  # Serve's own records name it so
        return {"request_id": request_id}
    return fields


def _utc(seconds: float) -> str:
    """A time of the system's clock, in ISO 8601 to a millisecond."""
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def _text(value: Any) -> str:
    """A value in a form without blanks around it, quoted unless it is a plain word: nobody forges a line by it."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value)
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, (tuple, list)):
        return ",".join(map(_text, value))
    return _text(json.dumps(value, default=repr)) if isinstance(value, dict) else str(value)
