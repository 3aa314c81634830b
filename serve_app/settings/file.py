"""A service's YAML file: settings of a service and of its models, with the command line's over them.

    model: Qwen/Qwen3-30B-A3B          # one model, its settings beside the service's
    layout: tp=4,ep=4
    host: 0.0.0.0

Several models stand in a list; what stands beside the list holds for all of them:

    max_model_len: 32768
    models:
      - {model: Qwen/Qwen3-30B-A3B, layout: "tp=4,ep=4", max_replicas: 2}
      - {model: Qwen/Qwen3-0.6B}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.yaml_file import YamlFile, read_yaml
from qwen3_dist.errors import ConfigError, QwenDistError
from qwen3_dist.settings_reader import plain_value
from serve_app.settings.keys import ADMIN_KEY, API_KEY
from serve_app.settings.model import ModelSettings
from serve_app.settings.service import ServiceConfig, read_service_config

# Environment variables of the command line, where a key is not visible as an option is, and their settings.
KEY_VARIABLES = {"QWEN3_DIST_API_KEY": API_KEY, "QWEN3_DIST_ADMIN_KEY": ADMIN_KEY}


@dataclass(frozen=True)
class EffectiveSetting:
    """A setting as it holds, and where it comes from. `model` is empty for a setting of the service."""

    model: str
    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class ServiceSource:
    """Where a service's settings come from: a file, if any, the `environment`, which wins over it, and the command
    line, which wins over both."""

    file: YamlFile | None
    given: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    instead_of: Callable[[str], str] = lambda name: ""  # advice for a name of vLLM's; "" for every other name

    def read(self) -> ServiceConfig:
        """Raises ConfigError, with file and line if the file is to blame."""
        try:
            return read_service_config(self._merged())
        except ConfigError as error:
            blamed = error.setting[-1] if error.setting else ""
            if self.file is None or blamed in {**self.environment, **self.given}:
                raise
            advice = self.instead_of(blamed)
            reason = f"{blamed} is vLLM's name; {advice}" if advice else str(error)
            raise self.file.refusal(error.setting, reason) from None

    @contextmanager
    def with_lines(self) -> Iterator[None]:
        """A context in which errors that blame a setting get the file and its line, if the file gives the setting."""
        try:
            yield
        except QwenDistError as error:
            if self.file is None or not error.setting:
                raise
            *path, name = error.setting
            source = self._source_of(name, tuple(path))
            if not source.startswith(f"{self.file.path}:"):
                raise
            raise ConfigError(f"{source}: {error}") from None

    def effective(self, config: ServiceConfig) -> Iterator[EffectiveSetting]:
        """All settings of `config`, which was read from here; secrets are not shown."""
        for part in (config.endpoint, config.ingress, config.telemetry):
            yield from self._of_part("", part, ())
        for index, model in enumerate(config.models):
            for part in _parts(model):
                yield from self._of_part(model.name, part, ("models", str(index)))

    def _of_part(self, model: str, part: Any, path: tuple[str, ...]) -> Iterator[EffectiveSetting]:
        for each in fields(part):
            if each.name == "engine":
                continue
            value = plain_value(getattr(part, each.name))
            if each.metadata.get("secret") and value:
                value = "(secret)"
            yield EffectiveSetting(model, each.name, value, self._source_of(each.name, path))

    def _source_of(self, name: str, path: tuple[str, ...]) -> str:
        if name in self.given:
            return "command line"
        if name in self.environment:
            return "environment"
        lines = self.file.lines if self.file is not None else {}
        for place in ((*path, name), (*path, "engine", name), (name,), ("engine", name)):
            if self.file is not None and place in lines:
                return f"{self.file.path}:{lines[place]}"
        return "default"

    def _merged(self) -> dict[str, Any]:
        values = dict(self.file.values) if self.file is not None else {}
        models = values.get("models")
        if isinstance(models, list) and "model" in self.given:
            raise ConfigError("the file lists models, so MODEL cannot be given beside it; leave MODEL out")
        if isinstance(models, list):
            values["models"] = [
                {name: value for name, value in model.items() if name not in self.given}
                if isinstance(model, Mapping)
                else model
                for model in models
            ]
        return {
            **values,
            **self.environment,
            **{name: value for name, value in self.given.items() if value != "" or name != "model"},
        }


def service_source(
    path: str | Path | None,
    given: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    instead_of: Callable[[str], str] = lambda name: "",
) -> ServiceSource:
    """The settings of the file at `path`, if one is given, those `given` on the command line, and the keys in the
    variables of KEY_VARIABLES. `instead_of` is advice for a name of vLLM's in the file, "" for every other name.

    Raises ConfigError if the file cannot be read.
    """
    variables = environment or {}
    keys = {name: variables[variable] for variable, name in KEY_VARIABLES.items() if variables.get(variable)}
    return ServiceSource(read_yaml(path) if path else None, given, keys, instead_of)


def _parts(model: ModelSettings) -> tuple[Any, ...]:
    return model.replica.engine, model.replica, model.scaling
