"""Formats reports for a terminal: one line for each value, sizes in bytes with a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A line `name   value` for each value that is not None. Values whose name contains "bytes" get a unit."""
    texts = {
        name: format_value(value, "bytes" in name) for name, value in report.items() if value is not None
    }
    width = max(map(len, texts), default=0) + 2
    return (f"{name:<{width}}{text}" for name, text in texts.items())


def format_value(value: Any, is_bytes: bool = False) -> str:
    """`value` as text. Skips None values of a mapping. An empty mapping or list is "none"."""
    if isinstance(value, Mapping):
        items = [(name, item) for name, item in value.items() if item is not None]
        return (
            ", ".join(f"{name} {format_value(item, is_bytes or 'bytes' in name)}" for name, item in items)
            or "none"
        )
    if isinstance(value, list):
        separator = ", " if all(isinstance(item, (int, float)) for item in value) else "; "
        return separator.join(format_value(item, is_bytes) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return format_bytes(value) if is_bytes else f"{value:,}"
    return str(value)


def format_bytes(count: float) -> str:
    """A number of bytes with the largest decimal unit that fits into it."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,} bytes"
