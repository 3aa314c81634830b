"""YAML files whose errors name the file, the line and the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cluster.yaml_mistakes import explain, glued_colon
from qwen3_dist.errors import ConfigError
from qwen3_dist.settings_reader import read_settings

T = TypeVar("T")
SettingPath = tuple[str, ...]  # names of mappings and positions in lists, outermost first


@dataclass(frozen=True)
class YamlFile:
    """The mapping that a file holds: scalars as text, None for null, and the line of every value by its path."""

    path: str
    values: dict[str, Any]
    lines: dict[SettingPath, int]

    def settings(self, cls: type[T], base: T | None = None) -> T:
        """Builds dataclass `cls` as `read_settings` does. Raises ConfigError with file, line and reason."""
        try:
            return read_settings(cls, self.values, base)
        except ConfigError as error:
            raise self.refusal(error.setting, str(error)) from None

    def refusal(self, setting: SettingPath, reason: str) -> ConfigError:
        """A ConfigError that names the file and the line of a setting, or of the innermost mapping that holds it."""
        while setting not in self.lines:
            setting = setting[:-1]
        return ConfigError(f"{self.path}:{self.lines[setting]}: {reason}")


def read_yaml(path: str | Path) -> YamlFile:
    """Raises ConfigError if the file cannot be read, is not valid YAML, holds no mapping, or gives a key twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise ConfigError(f"{path} cannot be read ({reason}); give a YAML file") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        (line, column), advice = explain(error, text)
        raise ConfigError(f"{path}:{line}:{column}: this is not valid YAML; {advice}") from None
    if not isinstance(node, yaml.MappingNode):
        if isinstance(node, yaml.ScalarNode) and (glued := glued_colon(text)) is not None:
            line, column = glued
            raise ConfigError(f"{path}:{line}:{column}: this is not valid YAML; put a space after the colon")
        raise ConfigError(f"{path}:1: a mapping `key: value` is expected at the top")
    file = YamlFile(str(path), {}, {})
    file.values.update(_plain(file, node, ()))
    return file


def _plain(file: YamlFile, node: yaml.Node, setting: SettingPath) -> Any:
    """The value of `node`; notes its line and those of all within."""
    file.lines[setting] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_plain(file, part, (*setting, str(index))) for index, part in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return None if node.tag.endswith(":null") else node.value
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(
                f"{file.path}:{key.start_mark.line + 1}: this is no name of a setting; if it is a template of another "
                "tool, fill it in first, and put quotes around text that begins with a bracket"
            )
        inner = (*setting, str(key.value))
        if re.match(r"-\w", inner[-1]):
            raise ConfigError(
                f"{file.path}:{key.start_mark.line + 1}: put a space after the dash of {inner[-1]}"
            )
        if inner[-1] in values:
            file.lines[inner] = value.start_mark.line + 1
            raise file.refusal(inner, f"{'.'.join(inner)} is given twice; keep one")
        values[inner[-1]] = _plain(file, value, inner)
    return values
