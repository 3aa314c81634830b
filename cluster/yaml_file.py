"""Reads a YAML file into frozen dataclasses. Errors name the file, the line and the reason."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qwen3_dist.errors import ConfigError

T = TypeVar("T")


def read_yaml(path: str | Path) -> yaml.MappingNode:
    """The top-level mapping of a YAML file. Raises ConfigError if the file cannot be read or holds no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise ConfigError(f"{path} cannot be read ({reason}); give a YAML file") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(
            f"{path}:{line}: this is not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:1: a mapping `key: value` is expected at the top")
    return node


def items(path: str | Path, node: yaml.Node, what: str) -> list[tuple[str, yaml.Node]]:
    """The keys and values of mapping `node`. Raises ConfigError, naming `what`, if `node` is not a mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise refusal(path, node, f"{what} must be a mapping `key: value`")
    pairs = [(str(key.value), value) for key, value in node.value]
    for index, (name, value) in enumerate(pairs):
        if name in (earlier for earlier, _ in pairs[:index]):
            raise refusal(path, value, f"{name} is given twice; keep one")
    return pairs


def build(path: str | Path, node: yaml.Node, cls: type[T], what: str, base: T | None = None) -> T:
    """Builds dataclass `cls` from mapping `node`. Missing fields come from `base`, or else from the defaults."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    lines: dict[str, yaml.Node] = {}
    for name, value in items(path, node, what):
        if name not in fields:
            raise refusal(path, value, f"{what} has no {name!r}; known are {', '.join(fields)}")
        lines[name] = value
        earlier = getattr(base, name) if base is not None else None
        values[name] = _value(path, value, hints[name], f"{what}.{name}", earlier)
    needed = [
        name
        for name, field in fields.items()
        if base is None
        and name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise refusal(path, node, f"{what} lacks {', '.join(needed)}")
    try:
        return dataclasses.replace(base, **values) if base is not None else cls(**values)  # type: ignore[type-var]
    except ConfigError as error:
        wrong_node = next((lines[name] for name in lines if str(error).startswith(name)), node)
        raise refusal(path, wrong_node, f"{what}: {error}") from None


def refusal(path: str | Path, node: yaml.Node, reason: str) -> ConfigError:
    """A ConfigError that names the file and line of `node`."""
    return ConfigError(f"{path}:{node.start_mark.line + 1}: {reason}")


def _value(path: str | Path, node: yaml.Node, kind: Any, what: str, earlier: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return build(path, node, typing.cast(type, kind), what, earlier)
    if typing.get_origin(kind) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise refusal(path, node, f"{what} must be a list")
        members = typing.get_args(kind)
        each = members[0] if members[-1] is Ellipsis else None
        if each is None and len(members) != len(node.value):
            raise refusal(path, node, f"{what} must hold {len(members)} values")
        kinds = [each] * len(node.value) if each is not None else members
        return tuple(
            _value(path, part, part_kind, what, None)
            for part, part_kind in zip(node.value, kinds, strict=True)
        )
    if not isinstance(node, yaml.ScalarNode):
        raise refusal(path, node, f"{what} must be one value of type {kind.__name__}")
    return _scalar(path, node, kind, what)


def _scalar(path: str | Path, node: yaml.ScalarNode, kind: Any, what: str) -> Any:
    text = node.value
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):  # YAML 1.1 reads 3.35e12 as text; it requires 3.35e+12
        try:
            number = float(text.replace("_", ""))
        except ValueError:
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number == number and number.is_integer():
            return int(number)
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    raise refusal(path, node, f"{what} must be {names.get(kind, kind.__name__)}, not {text!r}")
