"""Reads frozen settings dataclasses from plain values: of Python, of YAML and JSON, and of the command line alike.

A field's type says what its value may be. Text that stands for a number, a boolean or null is read as that where the
field wants it, since a command line has nothing but text. A type with a classmethod `parse` reads its values itself.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, replace
from types import NoneType
from typing import Any, TypeVar

from qwen3_dist.errors import ConfigError

T = TypeVar("T")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field with what `--help` and docs/settings.md say of it.

    `parse` reads the value where its type cannot say how; it raises ConfigError. A `secret` is never printed.
    """
    metadata = {"help": help, "choices": choices, "parse": parse, "secret": secret}
    if callable(default):
        return field(default_factory=default, repr=not secret, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


def setting_types(cls: type) -> dict[str, Any]:
    """The fields of settings dataclass `cls` with their resolved types."""
    hints = typing.get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls)}


def value_type(kind: Any) -> Any:
    """`kind` without None: `int` for `int | None`."""
    return (
        next((option for option in typing.get_args(kind) if option is not NoneType), kind)
        if _is_optional(kind)
        else kind
    )


def read_settings(
    cls: type[T], values: Mapping[str, Any], base: T | None = None, path: tuple[str, ...] = ()
) -> T:
    """Builds dataclass `cls` from `values`; fields without one are those of `base`, or else at their defaults.

    Dataclasses in fields take mappings. Raises ConfigError, whose `setting` is the path of the bad or unknown value,
    below `path`.
    """
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown_setting((*path, name), known)
    types = setting_types(cls)
    read: dict[str, Any] = {}
    for name, value in values.items():
        parse = known[name].metadata.get("parse")
        earlier = getattr(base, name) if base is not None else None
        try:
            read[name] = parse(value) if parse else read_value(types[name], value, (*path, name), earlier)
        except ConfigError as error:
            error.setting = error.setting or (*path, name)
            raise
    for name, each in known.items():
        if base is None and name not in read and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"setting {dotted((*path, name))!r} is required", (*path, name))
    try:
        return cls(**read) if base is None else replace(base, **read)  # type: ignore[type-var]
    except ConfigError as error:
        named = next((name for name in read if str(error).startswith(name)), None)
        error.setting = (*path, named) if named else path
        error.args = (f"{dotted(path)}: {error}" if path else str(error),)
        raise


def read_value(kind: Any, value: Any, path: tuple[str, ...], earlier: Any = None) -> Any:
    """`value` as type `kind` wants it. Raises ConfigError naming `path`, if it cannot be read so."""
    if _is_optional(kind):
        if value is None or (value == "null" and value_type(kind) is not str):
            return None
        kind = value_type(kind)
    if hasattr(kind, "parse"):
        return kind.parse(value)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{dotted(path)} must be a mapping, not {value!r}", path)
        return read_settings(typing.cast(type, kind), value, earlier, path)
    if typing.get_origin(kind) is tuple:
        return _read_tuple(typing.get_args(kind), value, path)
    number = _number(value) if kind in (int, float) else None
    if kind is int and number is not None and number == int(number):
        return int(number)
    if kind is float and number is not None:
        return float(number)
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ConfigError(f"{dotted(path)} must be {_EXPECTED[kind]}, not {value!r}", path)


def changed_settings(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass that are not at their defaults, as plain values that `read_settings` reads back."""
    default = type(settings)()
    return {
        each.name: plain_value(getattr(settings, each.name))
        for each in fields(settings)
        if getattr(settings, each.name) != getattr(default, each.name)
    }


def plain_value(value: Any) -> Any:
    """A setting as YAML and JSON can hold it."""
    if hasattr(value, "parse"):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return changed_settings(value)
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def unknown_setting(path: tuple[str, ...], known: Iterable[str]) -> ConfigError:
    """The refusal of a name that is not among the `known` ones, which it tells unless it finds what was meant."""
    near = difflib.get_close_matches(path[-1], known, 1)
    if near:
        return ConfigError(f"unknown setting {dotted(path)!r}; did you mean {near[0]}?", path)
    return ConfigError(f"unknown setting {dotted(path)!r}; known are {', '.join(sorted(known))}", path)


def _read_tuple(members: tuple[Any, ...], value: Any, path: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{dotted(path)} must be a list, not {value!r}", path)
    kinds = [members[0]] * len(value) if members[-1] is Ellipsis else list(members)
    if len(kinds) != len(value):
        raise ConfigError(f"{dotted(path)} must hold {len(kinds)} values, not {len(value)}", path)
    return tuple(
        read_value(kind, part, (*path, str(place)))
        for place, (kind, part) in enumerate(zip(kinds, value, strict=True))
    )


def _number(value: Any) -> int | float | None:
    """A finite number, given as one or as text (`4`, `1_000`, `3.35e12`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
        return number if abs(number) < float("inf") else None
    return None


def _is_optional(kind: Any) -> bool:
    """Whether a setting of type `kind` may be None."""
    return NoneType in typing.get_args(kind)


def dotted(path: tuple[str, ...]) -> str:
    """The name of a nested setting as messages have it: device.memory_bytes."""
    return ".".join(path)
