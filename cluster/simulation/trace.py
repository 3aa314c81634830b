"""Reads and checks a trace of requests: JSON lines or CSV, one request per line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.simulation.arrivals import Request
from qwen3_dist.errors import ConfigError

_NEEDED = ("arrival_s", "input_len", "output_len")
_OPTIONAL = ("prefix_id", "prefix_len")


def read_trace(path: Path, max_model_len: int | None = None) -> list[Request]:
    """The requests of `path` (`.jsonl` or `.csv` with a header), in order of arrival.

    Fields: `arrival_s, input_len, output_len` and, for shared prefixes, `prefix_id` (any text or number) and
    `prefix_len`. Times are made relative to the first arrival, so that any clock will do. Raises ConfigError with
    file, line and reason, also for a request of more than `max_model_len` tokens.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"{path}: a trace is a .jsonl or .csv file; rename or convert it")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the trace cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the trace is not UTF-8 text") from None
    rows = _json_rows(path, text) if path.suffix == ".jsonl" else _csv_rows(path, text)
    requests: list[Request] = []
    prefix_ids: dict[str, int] = {}
    for line, row in rows:
        request = _request(f"{path}:{line}", row, prefix_ids)
        total = request.input_len + request.output_len
        if max_model_len is not None and total > max_model_len:
            raise ConfigError(
                f"{path}:{line}: {request.input_len} + {request.output_len} tokens exceed the {max_model_len} "
                "that one sequence may have"
            )
        if requests and request.arrival_s < requests[-1].arrival_s:
            raise ConfigError(f"{path}:{line}: arrival_s decreases; sort the trace by arrival_s")
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path}: the trace holds no request")
    start_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in requests]


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{line}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{line}: expected a JSON object with {', '.join(_NEEDED)}")
        yield line, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}:1: the header lacks {missing[0]}; it must name {', '.join(_NEEDED)}")
    for row in reader:
        if None in row:
            raise ConfigError(f"{path}:{reader.line_num}: more values than the header has names")
        yield reader.line_num, {name: value for name, value in row.items() if value not in ("", None)}


def _request(where: str, row: dict[str, Any], prefix_ids: dict[str, int]) -> Request:
    unknown = sorted(set(row) - {*_NEEDED, *_OPTIONAL})
    if unknown:
        raise ConfigError(
            f"{where}: unknown field {unknown[0]!r}; known are {', '.join(_NEEDED + _OPTIONAL)}"
        )
    arrival_s = _number(where, row, "arrival_s")
    if arrival_s < 0:
        raise ConfigError(f"{where}: arrival_s must not be negative, not {arrival_s:g}")
    input_len, output_len = (_count(where, row, name, 1) for name in ("input_len", "output_len"))
    prefix_len = _count(where, row, "prefix_len", 0) if "prefix_len" in row else 0
    if prefix_len > input_len:
        raise ConfigError(f"{where}: prefix_len={prefix_len} is more than input_len={input_len}")
    if prefix_len and "prefix_id" not in row:
        raise ConfigError(f"{where}: prefix_len needs a prefix_id, which names the shared prefix")
    name = str(row.get("prefix_id", ""))
    prefix_id = prefix_ids.setdefault(name, len(prefix_ids)) if name else 0
    return Request(arrival_s, input_len, output_len, prefix_id, prefix_len)


def _number(where: str, row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if value is None:
        raise ConfigError(f"{where}: {name} is missing")
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {name} must be a number, not {value!r}")
    return number


def _count(where: str, row: dict[str, Any], name: str, least: int) -> int:
    number = _number(where, row, name)
    if number != int(number) or number < least:
        raise ConfigError(f"{where}: {name} must be a whole number of at least {least}, not {row[name]!r}")
    return int(number)
