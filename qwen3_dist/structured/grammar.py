"""From what a request asks of its text's form to a grammar that ranks can follow; checked and bounded here.

A grammar is text in llguidance's own form, so it travels to the ranks as it is. `grammar_matcher` follows it.
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
    fitted,
    has_names_that_may_repeat,
    names_that_may_repeat,
    subschemas,
    without_options,
)

MOST_BYTES = 128 << 10  # of one schema, expression, grammar or list of choices
KEPT_GRAMMARS = 64  # that a rank keeps built, at their start, where they are small
_TOO_COMPLEX = "it is too complex"
_MOST_PARTS = 500  # of a schema, among which the one to blame is looked for
_TRIAL = Path(__file__).with_name("grammar_trial.py")
_TRIAL_TIMEOUT_S = 30  # it has two seconds of CPU, but maybe has to wait for them


def compile_grammar(outputs: StructuredOutputs) -> str:
    """The grammar of `outputs`, as text for `Grammars.matcher`.

    The first time it is tried out in a process of its own, which takes a tenth of a second and at most some
    seconds: call it in a thread. Raises RequestError for a form that is wrong, too large or beyond the library.
    """
    kind, source = _source(outputs)
    if len(source) > MOST_BYTES:
        raise _refused(kind, f"its source has {len(source)} bytes, and {MOST_BYTES} are the most")
    found = _tried.get((kind, source))
    if found is None:
        found = _try_out(kind, source)
        _tried.put((kind, source), found)
    grammar, problem = found
    if problem:
        raise _refused(kind, problem)
    return grammar


class SchemaFault(NamedTuple):
    """What the library cannot follow of a schema: the number of the schema, the place in it, and why.

    `is_lacking` tells what the library has not from what is no schema.
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
    """The first of `schemas` that the library cannot follow, and where; None if it follows each.

    Takes as long as `compile_grammar` does, or twice that.
    """
    for number, problem in enumerate(_problems(schemas)):
        if problem:
            return SchemaFault(number, _place(schemas[number], problem), *_schema_problem(problem))
    return None


def _place(schema: Any, problem: str) -> str:
    """Where in `schema` the innermost schemas lie that have the problem; the first of them."""
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
    """What is wrong with each, "" for nothing; no more than were tried, if they take too long."""
    source = json.dumps(schemas)
    repeat = [NAMES_MAY_REPEAT if has_names_that_may_repeat(schema) else "" for schema in schemas]
    found = _tried.get(("schemas", source.encode()))
    if found is None:
        found = json.dumps(_ask_trial("schemas", source).get("problems", ())), ""
        _tried.put(("schemas", source.encode()), found)
    return [problem or ours for problem, ours in zip(json.loads(found[0]), repeat, strict=False)]


def _schema_problem(problem: str) -> tuple[str, bool]:
    """What is wrong with a schema in our words, and whether it is that the library lacks something."""
    if problem == NAMES_MAY_REPEAT:
        return problem, True
    lacking = re.fullmatch(r"Unimplemented keys: \[(.*)\]", problem)
    if lacking is not None:
        return f"the keyword{'s' if ',' in lacking[1] else ''} {lacking[1]} cannot be held", True
    if problem.startswith("oneOf constraints"):
        return "oneOf of alternatives that overlap cannot be held", True
    if problem.startswith("Resource '"):
        return f"$ref {problem.split(chr(39))[1]!r} leads out of the schema", False
    lacks = any(
        word in problem for word in ("not supported", "only supported", "Unknown format", "not disjoint")
    )
    return _one_sentence(problem), lacks


def _source(outputs: StructuredOutputs) -> tuple[str, bytes]:
    """Which field is set, and its value as UTF-8 text; JSON for what is not text."""
    if outputs.json_object:
        return "json_object", b'{"type": "object"}'
    kind = next(name for name in ("json", "regex", "choice", "grammar") if getattr(outputs, name) is not None)
    value = getattr(outputs, kind)
    if kind == "choice" and not (value and all(isinstance(text, str) for text in value)):
        raise _refused(kind, "it must be a list of one or more texts")
    if kind in ("regex", "grammar") and not isinstance(value, str):
        raise _refused(kind, "it must be text")
    try:
        if kind in ("regex", "grammar"):
            return kind, value.encode()
        if kind == "json" and isinstance(value, str):
            value = json.loads(value)
            value = without_options(value) if isinstance(value, Mapping) else value
        if kind == "json":
            value = {} if value is True else fitted(value)
        return kind, json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError:
        raise _refused(kind, "it is too deeply nested") from None
    except (ValueError, TypeError) as error:
        raise _refused(kind, str(error)) from None


def _try_out(kind: str, source: bytes) -> tuple[str, str]:
    """The grammar, or a sentence that says what is wrong with it."""
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            "structured_outputs need the package llguidance; install it beside qwen3_dist",
            param="structured_outputs",
        )
    answer = _ask_trial("json" if kind == "json_object" else kind, source.decode())
    problem = answer.get("problem", "")
    fault = None
    if kind == "json" and problem != _TOO_COMPLEX:
        schema = json.loads(source)
        fault = schema_fault([schema]) if problem or has_names_that_may_repeat(schema) else None
    return answer.get("grammar", ""), fault.sentence if fault else _one_sentence(problem)


def _ask_trial(kind: str, source: str) -> dict[str, Any]:
    """What the process says that tries grammars out."""
    task, command = json.dumps({"kind": kind, "source": source}), [sys.executable, "-P", str(_TRIAL)]
    with _trials:
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
    """The library's reason without the source that it quotes."""
    if "NoExtension" in problem:
        return "no text has this form"
    reason = re.sub(r"(?m)^ *(\d+ \||\^).*\n?", "", problem.replace("<non-verbose/>", ""))
    reason = (
        re.sub(r"\s+", " ", reason.partition("; following special tokens")[0])
        .strip()
        .rpartition("error: ")[2]
    )
    return reason if len(reason) <= 200 else f"{reason[:100]} ... {reason[-100:]}"


class _Tried:
    """What was found out about the sources tried last; bounded in number and in bytes."""

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


_tried = _Tried()
_trials = threading.BoundedSemaphore(2)
