"""How long prompts and answers are, and when a trace has them sent. Prompts get their words in `prompts`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen3_dist.errors import ConfigError

# Lengths in tokens of single turns of ShareGPT: a lognormal distribution with the means that the PagedAttention paper
# gives (Kwon et al. 2023, figure 11) and the coefficient of variation assumed here, since the paper has means alone.
SHAREGPT_INPUT_MEAN, SHAREGPT_OUTPUT_MEAN, SHAREGPT_CV = 161.0, 338.0, 1.0
# vLLM's limits for requests from ShareGPT: shorter or longer ones are left out.
SHORTEST, LONGEST_INPUT, LONGEST_TOTAL = 4, 1024, 2048
# Tokens for which one of a Mooncake trace's `hash_ids` stands.
HASH_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """One request without its words: `input_len` prompt tokens, `output_len` tokens to generate.

    The first `prefix_len` prompt tokens are the same in all requests of a run. `hash_ids` name the prompt's blocks of
    `HASH_BLOCK` tokens; equal ids are equal text. `arrival_s` is set by traces, in seconds from the first request.
    """

    input_len: int
    output_len: int
    prefix_len: int = 0
    hash_ids: tuple[int, ...] = ()
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: the prompt's text, its length in tokens, and how many tokens to generate."""

    prompt: str
    input_len: int
    output_len: int


def random_shapes(
    count: int, input_len: int, output_len: int, range_ratio: float, prefix_len: int, seed: int
) -> list[Shape]:
    """Lengths drawn evenly from [len * (1 - range_ratio), len * (1 + range_ratio)], at least 1 token.

    The shared prefix comes before the input and is not in `input_len`, as vLLM counts.
    """
    rng = random.Random(seed)

    def draw(length: int) -> int:
        low, high = math.floor(length * (1 - range_ratio)), math.ceil(length * (1 + range_ratio))
        return max(1, rng.randint(low, high))

    return [Shape(prefix_len + draw(input_len), draw(output_len), prefix_len) for _ in range(count)]


def sharegpt_shapes(count: int, seed: int) -> list[Shape]:
    """Lengths distributed as those of ShareGPT's first turns, within vLLM's limits."""
    rng = random.Random(seed)
    variance = math.log1p(SHAREGPT_CV**2)  # of the logarithm; E[exp N(mu, v)] = exp(mu + v / 2)

    def draw(mean: float) -> int:
        return round(rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance)))

    shapes: list[Shape] = []
    while len(shapes) < count:
        input_len, output_len = draw(SHAREGPT_INPUT_MEAN), draw(SHAREGPT_OUTPUT_MEAN)
        if within_limits(input_len, output_len):
            shapes.append(Shape(input_len, output_len))
    return shapes


def within_limits(input_len: int, output_len: int) -> bool:
    """Whether vLLM would take a ShareGPT turn of these lengths."""
    long_enough = min(input_len, output_len) >= SHORTEST
    return long_enough and input_len <= LONGEST_INPUT and input_len + output_len <= LONGEST_TOTAL


def read_turns(path: Path, seed: int) -> list[tuple[str, str]]:
    """The first prompt and its answer of each conversation in a ShareGPT file, shuffled. Raises ConfigError."""
    text = _text(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: a ShareGPT file is a JSON list of objects with `conversations`")
    turns = [turn for entry in entries if (turn := _first_turn(entry)) is not None]
    random.Random(seed).shuffle(turns)
    return turns


def _first_turn(entry: Any) -> tuple[str, str] | None:
    said = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(said, list) or len(said) < 2:
        return None
    prompt, answer = (part.get("value") if isinstance(part, dict) else None for part in said[:2])
    return (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


def read_trace(path: Path, speedup: float, most: int | None = None) -> list[Shape]:
    """The first `most` requests of a trace: JSON lines with `timestamp`, `input_length` and `output_length`.

    A timestamp is a number of milliseconds, as in Mooncake's traces, or a date and time, as in Azure's. Times count
    from the first request and are divided by `speedup`. `hash_ids` are optional; other fields are ignored. Raises
    ConfigError with file and line.
    """
    shapes: list[Shape] = []
    first = last = 0.0
    for line, row in _rows(path):
        where = f"{path}:{line}"
        at = _seconds(where, row)
        if not shapes:
            first = last = at
        if at < last:
            raise ConfigError(f"{where}: timestamp goes back in time; sort the trace by timestamp")
        last = at
        lengths = [_count(where, row, name) for name in ("input_length", "output_length")]
        shapes.append(
            Shape(lengths[0], lengths[1], 0, _hash_ids(where, row), arrival_s=(at - first) / speedup)
        )
        if len(shapes) == most:
            break
    if not shapes:
        raise ConfigError(f"{path}: the trace holds no request")
    return shapes


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); correct --dataset-path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; correct --dataset-path") from None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(_text(path).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{line}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}:{line}: expected a JSON object with timestamp, input_length and output_length"
            )
        yield line, row


def _seconds(where: str, row: dict[str, Any]) -> float:
    value = row.get("timestamp")
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
        if moment is not None:
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value / 1e3
    raise ConfigError(f"{where}: timestamp must be in milliseconds or a date and time, not {value!r}")


def _count(where: str, row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {name} must be a whole number of at least 1, not {value!r}")
    return value


def _hash_ids(where: str, row: dict[str, Any]) -> tuple[int, ...]:
    value = row.get("hash_ids") or []
    if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
        raise ConfigError(f"{where}: hash_ids must be a list of whole numbers, not {value!r}")
    return tuple(value)
