"""Prints docs/settings.md from the settings dataclasses. `make docs` writes the file, and a test checks it."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from typing import Any

from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import setting_types, value_type
from serve_app.settings import (
    EndpointSettings,
    IngressSettings,
    ReplicaSettings,
    ScalingSettings,
    TelemetrySettings,
)

_TOP = """
<!-- Made by tools/settings_page.py from the settings' dataclasses. `make docs` writes it; do not edit. -->

# Settings

A setting has one name in Python, in YAML and on the command line, where it is an option: `max_num_seqs=64`,
`max_num_seqs: 64` and `--max-num-seqs 64` say the same. Booleans may be written `--overlap`, `--no-overlap` or
`--overlap false`; `null` unsets a setting that may be unset.

- `LLM(model, **settings)` takes the engine's settings.
- `qwen3-dist serve`, `deploy` and `config` take all of them, as options or in a file ([Deploy](deploy.md#the-file)).
- `generate`, `chat` and `bench` take the engine's.

An unknown name or a value of the wrong type is refused with a sentence that names it. `serve`, `deploy`, `generate`,
`chat` and `bench` also accept vLLM's common options; [Deploy](deploy.md#vllms-options) lists them. Environment
variables set nothing here, except those that Ray, NCCL and the hub read themselves.
"""
_PARTS = (
    (
        "The endpoint",
        EndpointSettings,
        "Where a service answers. `deploy` changes `route_prefix`; another `name`, `host` or `port` is a new service.",
    ),
    ("The ingress", IngressSettings, "Limits, keys and stored responses. A change reloads no model."),
    ("Logs and traces", TelemetrySettings, "What is logged, and where traces go. A change reloads no model."),
    (
        "Scaling",
        ScalingSettings,
        "How many replicas a model has, and their health. A change reloads no model.",
    ),
    ("Each replica", ReplicaSettings, "What clients see of a model. A change reloads it."),
    (
        "The engine",
        EngineConfig,
        "One sharded model: its layout, its KV cache, its steps. Each replica has one; a change reloads it.",
    ),
)
_KINDS = {str: "text", int: "integer", float: "number", bool: "true or false"}
_FORMS = {
    "Layout": "layout",
    "Speculation": "`ngram,k=N`",
    "LoraAdapters": "`NAME=PATH`",
    "WeightsVersion": "`VERSION=DIRECTORY`",
    "HfOverrides": "JSON",
}


def page() -> str:
    """The whole page as Markdown text."""
    parts = [_TOP.strip()]
    for title, cls, about in _PARTS:
        parts.append(f"## {title}\n\n{about}")
        parts += [_entry(cls, field) for field in dataclasses.fields(cls) if field.name != "engine"]
    return "\n\n".join(parts) + "\n"


def _entry(cls: type, field: dataclasses.Field[Any]) -> str:
    option = f"`--{field.name.replace('_', '-')}`"
    if field.name == "model":
        option = "the first argument"
    choices = field.metadata.get("choices")
    meaning = field.metadata["help"]
    first = meaning.partition(":")[0]
    if first in (choices or ()):
        meaning = f"`{first}`{meaning.removeprefix(first)}"
    meaning = textwrap.fill(f"{meaning[0].upper()}{meaning[1:]}.", 118, break_on_hyphens=False)
    kind = _kind(setting_types(cls)[field.name], choices)
    return f"### {field.name}\n\n{option} · {kind} · default: {_default(field)}\n\n{meaning}"


def _kind(kind: Any, choices: tuple[str, ...] | None) -> str:
    if choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    kind = value_type(kind)
    if typing.get_origin(kind) is not None:
        return "`NAME=VALUE`, may be repeated"
    return _KINDS.get(kind) or _FORMS[kind.__name__]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is None:
        return "unset"
    if field.default is dataclasses.MISSING or str(field.default) == "":
        return "empty"
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(page(), end="")
