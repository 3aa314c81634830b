"""Reports as people read them: a line for each value, bytes with their unit, and nothing for what has no value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A line `name   value` for each value of `report` that is not None. Names that speak of bytes get units."""
    shown = {name: readable(value, "bytes" in name) for name, value in report.items() if value is not None}
    width = max(map(len, shown), default=0) + 2
    return (f"{name:<{width}}{text}" for name, text in shown.items())


def readable(value: Any, is_bytes: bool = False) -> str:
    """`value` in words; of a mapping the values that are not None, and "none" if it or a list is empty."""
    if isinstance(value, Mapping):
        items = [(name, item) for name, item in value.items() if item is not None]
        return (
            ", ".join(f"{name} {readable(item, is_bytes or 'bytes' in name)}" for name, item in items)
            or "none"
        )
    if isinstance(value, list):
        separator = ", " if all(isinstance(item, (int, float)) for item in value) else "; "
        return separator.join(readable(item, is_bytes) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return bytes_text(value) if is_bytes else f"{value:,}"
    return str(value)


def bytes_text(count: float) -> str:
    """A number of bytes with the largest unit of which it has at least one."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,} bytes"
