"""Compiles structured outputs to grammars for llguidance, with limits on size and complexity.

A compiled grammar is text in llguidance's format, which is sent to the ranks. `worker/sampling/grammar_matcher.py`
matches it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.structured.json_schema import (
    NAMES_MAY_REPEAT,
    has_names_that_may_repeat,
    names_that_may_repeat,
    normalized,
    subschemas,
    without_options,
)

MOST_BYTES = 128 << 10  # of the source of one schema, expression, grammar or list of choices
KEPT_GRAMMARS = 64  # built grammars that a rank keeps
_TOO_COMPLEX = "it is too complex"
_MOST_PARTS = 500  # subschemas that are searched for the cause of an error
_TRIAL = Path(__file__).with_name("grammar_trial.py")
_TRIAL_TIMEOUT_S = 30  # of wall time; its limit of CPU time is two seconds


def compile_grammar(outputs: StructuredOutputs) -> str:
    """Compiles `outputs` to a grammar for `Grammars.matcher`.

    A new grammar is tried in a separate process first, which takes a tenth of a second and at most some seconds, so
    call this in a thread. Raises RequestError for a source that is invalid, too large or not supported by llguidance.
    """
    kind, source = _source(outputs)
    if len(source) > MOST_BYTES:
        raise _refused(kind, f"its source has {len(source)} bytes and at most {MOST_BYTES} are allowed")
    found = _trial_cache.get((kind, source))
    if found is None:
        found = _try_out(kind, source)
        _trial_cache.put((kind, source), found)
    grammar, problem = found
    if problem:
        raise _refused(kind, problem)
    return grammar


class SchemaFault(NamedTuple):
    """An error in the schema `number` of a list: its place as a dotted path, and the reason.

    `is_lacking`: the schema is valid, but llguidance does not support this part of it.
    """

    number: int
    place: str
    problem: str
    is_lacking: bool

    @property
    def sentence(self) -> str:
        at = f" at {self.place}" if self.place else ""
        return f"{self.problem}{at}{'; leave it out' if self.is_lacking else ''}"


def schema_fault(schemas: Sequence[Any]) -> SchemaFault | None:
    """The error of the first of `schemas` that llguidance cannot compile; None if it compiles all of them.

    Takes up to twice as long as `compile_grammar`.
    """
    for number, problem in enumerate(_problems(schemas)):
        if problem:
            return SchemaFault(number, _place(schemas[number], problem), *_schema_problem(problem))
    return None


def _place(schema: Any, problem: str) -> str:
    """The dotted path of the first innermost subschema of `schema` that has the problem; "" if none is found."""
    if problem == NAMES_MAY_REPEAT:
        return ".".join(next(names_that_may_repeat(schema), ()))
    parts = dict(itertools.islice(subschemas(schema), _MOST_PARTS))
    shared = {key: schema[key] for key in ("$defs", "definitions") if parts and key in schema}
    options = {"x-guidance": schema["x-guidance"]} if parts and "x-guidance" in schema else {}
    problems = _problems([{**shared, **part, **options} for part in parts.values()])
    faulty = [path for path, found in zip(parts, problems, strict=False) if found == problem]
    inner = (path for path in faulty if not any(other[: len(path)] == path != other for other in faulty))
    return ".".join(next(inner, ()))


def _problems(schemas: Sequence[Any]) -> list[str]:
    """The problem of each schema, "" for none. The list is shorter than `schemas` if trying them takes too long."""
    source = json.dumps(schemas)
    repeat = [NAMES_MAY_REPEAT if has_names_that_may_repeat(schema) else "" for schema in schemas]
    found = _trial_cache.get(("schemas", source.encode()))
    if found is None:
        found = json.dumps(_run_trial("schemas", source).get("problems", ())), ""
        _trial_cache.put(("schemas", source.encode()), found)
    return [problem or ours for problem, ours in zip(json.loads(found[0]), repeat, strict=False)]


def _schema_problem(problem: str) -> tuple[str, bool]:
    """Rewords llguidance's message. Returns it, and whether it says that llguidance lacks support."""
    if problem == NAMES_MAY_REPEAT:
        return problem, True
    lacking = re.fullmatch(r"Unimplemented keys: \[(.*)\]", problem)
    if lacking is not None:
        return f"the keyword{'s' if ',' in lacking[1] else ''} {lacking[1]} cannot be enforced", True
    if problem.startswith("oneOf constraints"):
        return "oneOf of alternatives that overlap cannot be enforced", True
    if problem.startswith("Resource '"):
        return f"$ref {problem.split(chr(39))[1]!r} leads out of the schema", False
    lacks = any(
        word in problem for word in ("not supported", "only supported", "Unknown format", "not disjoint")
    )
    return _one_sentence(problem), lacks


def _source(outputs: StructuredOutputs) -> tuple[str, bytes]:
    """The name of the field that is set, and its value in UTF-8; JSON if the value is not a string."""
    if outputs.json_object:
        return "json_object", b'{"type": "object"}'
    kind = next(name for name in ("json", "regex", "choice", "grammar") if getattr(outputs, name) is not None)
    value = getattr(outputs, kind)
    if kind == "choice" and not (value and all(isinstance(text, str) for text in value)):
        raise _refused(kind, "it must be a list of one or more strings")
    if kind in ("regex", "grammar") and not isinstance(value, str):
        raise _refused(kind, "it must be a string")
    try:
        if kind in ("regex", "grammar"):
            return kind, value.encode()
        if kind == "json" and isinstance(value, str):
            value = json.loads(value)
            value = without_options(value) if isinstance(value, Mapping) else value
        if kind == "json":
            value = {} if value is True else normalized(value)
        return kind, json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError:
        raise _refused(kind, "it is too deeply nested") from None
    except (ValueError, TypeError) as error:
        raise _refused(kind, str(error)) from None


def _try_out(kind: str, source: bytes) -> tuple[str, str]:
    """Compiles and tries a source. Returns the grammar and "", or "" and what is wrong with it."""
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            "structured_outputs need the package llguidance; install it beside qwen3_dist",
            param="structured_outputs",
        )
    answer = _run_trial("json" if kind == "json_object" else kind, source.decode())
    problem = answer.get("problem", "")
    fault = None
    if kind == "json" and problem != _TOO_COMPLEX:
        schema = json.loads(source)
        fault = schema_fault([schema]) if problem or has_names_that_may_repeat(schema) else None
    return answer.get("grammar", ""), fault.sentence if fault else _one_sentence(problem)


def _run_trial(kind: str, source: str) -> dict[str, Any]:
    """Runs `grammar_trial.py` in a process and returns its answer."""
    task, command = json.dumps({"kind": kind, "source": source}), [sys.executable, "-P", str(_TRIAL)]
    with _trial_slots:
        try:
            done = subprocess.run(
                command, input=task, text=True, capture_output=True, timeout=_TRIAL_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return {"problem": _TOO_COMPLEX}
    if done.returncode != 0 or not done.stdout:
        return {"problem": _TOO_COMPLEX}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _refused(kind: str, problem: str) -> RequestError:
    return RequestError(
        f"structured_outputs.{kind} cannot be used: {problem}",
        param=f"structured_outputs.{kind}",
    )


def _one_sentence(problem: str) -> str:
    """llguidance's message without the source that it quotes, at most 200 characters."""
    if "NoExtension" in problem:
        return "no text has this form"
    reason = re.sub(r"(?m)^ *(\d+ \||\^).*\n?", "", problem.replace("<non-verbose/>", ""))
    reason = (
        re.sub(r"\s+", " ", reason.partition("; following special tokens")[0])
        .strip()
        .rpartition("error: ")[2]
    )
    return reason if len(reason) <= 200 else f"{reason[:100]} ... {reason[-100:]}"


class _TrialCache:
    """A cache of trials: the grammar and the problem of recent sources, limited in number and in bytes.
    Thread-safe."""

    def __init__(self, most: int = 256, most_bytes: int = 4 << 20) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0
        self._found: OrderedDict[tuple[str, bytes], tuple[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, bytes]) -> tuple[str, str] | None:
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def put(self, key: tuple[str, bytes], found: tuple[str, str]) -> None:
        with self._lock:
            if key not in self._found:
                self._found[key] = found
                self._bytes += _size(key, found)
            while len(self._found) > self._most or self._bytes > self._most_bytes:
                self._bytes -= _size(*self._found.popitem(last=False))


def _size(key: tuple[str, bytes], found: tuple[str, str]) -> int:
    return len(key[1]) + len(found[0]) + len(found[1])


_trial_cache = _TrialCache()
_trial_slots = threading.BoundedSemaphore(2)
