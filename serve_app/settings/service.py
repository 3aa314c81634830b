"""`ServiceConfig`: everything a service needs to know, in parts by who needs them and what a change costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings, setting, setting_types, unknown_setting
from serve_app.settings.ingress import IngressConfig, IngressSettings, ServedModel
from serve_app.settings.model import ModelSettings, ReplicaSettings, ScalingSettings
from serve_app.settings.telemetry import TelemetrySettings

APP_NAME = "qwen3_dist"
INGRESS, REPLICA = "Ingress", "EngineReplica"  # Serve's names of our deployments


@dataclass(frozen=True)
class EndpointSettings:
    """Where the service answers. `deploy` can change `route_prefix`; the others need a new service."""

    name: str = setting(
        APP_NAME, "name of the service, and of its gateway application; unique in a Ray cluster"
    )
    route_prefix: str = setting("/", "path below which the service answers; unique in a Ray cluster")
    host: str = setting("127.0.0.1", "address the HTTP server listens on; 0.0.0.0 for every interface")
    port: int = setting(8000, "port the HTTP server listens on")
    ssl_certfile: str = setting(
        "",
        "PEM file of the certificate, and of its chain, on each node with a proxy; empty: HTTP without TLS",
    )
    ssl_keyfile: str = setting("", "PEM file of the certificate's private key, without a password")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name) or "--" in self.name:
            raise ConfigError(f"name must be letters, digits, '_', '.' and single '-', not {self.name!r}")
        if not re.fullmatch(r"/|(/[\w.~-]+)+", self.route_prefix):
            raise ConfigError(f"route_prefix must be a path such as / or /small, not {self.route_prefix!r}")
        if not self.host:  # to a socket that is every interface
            raise ConfigError("host must be an address; 0.0.0.0 is every interface")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port must lie between 1 and 65535, not {self.port}")
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            given, missing = ("certfile", "keyfile") if self.ssl_certfile else ("keyfile", "certfile")
            raise ConfigError(f"ssl_{given} needs ssl_{missing} beside it")


@dataclass(frozen=True)
class ServiceConfig:
    """One HTTP endpoint and the models it answers for."""

    models: tuple[ModelSettings, ...] = (ModelSettings(),)
    ingress: IngressSettings = field(default_factory=IngressSettings)
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models must hold at least one model")
        taken: dict[str, str] = {}  # application of Serve: the model that has it
        names: set[str] = set()
        for index, model in enumerate(self.models):
            setting = ("models", str(index))
            for name in (model.name, *model.replica.engine.lora.names):
                if name in names:
                    raise ConfigError(
                        f"two models or adapters are called {name!r}; give each a model_name of its own",
                        setting,
                    )
                names.add(name)
            other = taken.setdefault(self.application(model), model.name)
            if other != model.name:
                raise ConfigError(
                    f"the model names {other!r} and {model.name!r} differ only in characters that Ray Serve does not "
                    "take; give each a model_name of letters, digits, '_', '.' and '-'",
                    setting,
                )

    @property
    def applications(self) -> list[str]:
        """The names of all applications of Serve: the gateway's, then each model's."""
        return [self.endpoint.name, *(self.application(model) for model in self.models)]

    @property
    def graceful_shutdown_timeout_s(self) -> float:
        """Longest time that requests of any model have to end."""
        return max(model.scaling.graceful_shutdown_timeout_s for model in self.models)

    def application(self, model: ModelSettings) -> str:
        """The application of Serve that holds a model's replicas."""
        return f"{self.endpoint.name}--" + re.sub(r"[^\w.-]", "-", model.name)

    def ingress_config(self, in_one_application: bool = False) -> IngressConfig:
        """The config that each ingress replica gets: with hashes of keys, since Serve's status shows it."""
        return IngressConfig(
            self.ingress.with_hashes(),
            tuple(
                ServedModel(
                    model.name,
                    "" if in_one_application else self.application(model),
                    tuple(model.replica.engine.lora.names),
                    model.scaling.min_replicas,
                    model.scaling.max_replicas,
                    model.scaling.max_ongoing_requests,
                    model.scaling.health_check_period_s,
                    model.scaling.health_check_timeout_s,
                )
                for model in self.models
            ),
            self.telemetry,
        )


# The settings of a model stand side by side in files, arguments and options, as do those of a service.
MODEL_PARTS = (EngineConfig, ReplicaSettings, ScalingSettings)
SERVICE_PARTS = (IngressSettings, EndpointSettings, TelemetrySettings)


def flat_names(*parts: type) -> set[str]:
    """The names of all settings of `parts`."""
    return {name for part in parts for name in setting_types(part)} - {"engine"}


def read_service_config(args: Mapping[str, Any]) -> ServiceConfig:
    """Builds a config from flat `args`: settings of one model and of the service side by side.

    `engine` may also be a mapping of the engine's settings, and `models` a list of mappings, each with the settings of
    one model over those that stand beside `models`. Values may be text, as a command line has it. Raises ConfigError
    naming the setting that is unknown or unusable.
    """
    models = args.get("models", [{}])
    if not isinstance(models, (list, tuple)) or not all(isinstance(model, Mapping) for model in models):
        raise ConfigError(f"models must be a list of mappings, not {models!r}")
    shared = {name: value for name, value in args.items() if name != "models"}
    of_service = flat_names(*SERVICE_PARTS)
    parts = _read_parts({n: v for n, v in shared.items() if n in of_service}, *SERVICE_PARTS)
    shared = {name: value for name, value in shared.items() if name not in of_service}
    return ServiceConfig(tuple(_read_models(shared, models)), *parts)


def _read_models(shared: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Iterator[ModelSettings]:
    for index, own in enumerate(models):
        try:
            yield read_model_settings({**shared, **own})
        except ConfigError as error:
            if error.setting and error.setting[0] in own:
                error.setting = ("models", str(index), *error.setting)
            raise


def read_model_settings(args: Mapping[str, Any]) -> ModelSettings:
    """One model from flat `args`. Raises ConfigError naming the setting that is unknown or unusable."""
    nested = args.get("engine", {})
    if not isinstance(nested, Mapping):
        raise ConfigError(f"engine must be a mapping of engine settings, not {nested!r}")
    flat = {name: value for name, value in args.items() if name != "engine"} | dict(nested)
    known = flat_names(*MODEL_PARTS, *SERVICE_PARTS)
    if unknown := sorted(flat.keys() - known):
        raise unknown_setting((unknown[0],), known)
    if misplaced := sorted(flat.keys() - flat_names(*MODEL_PARTS)):
        raise ConfigError(
            f"{misplaced[0]} is a setting of the service, not of a model; move it beside models",
            (misplaced[0],),
        )
    engine, replica, scaling = _read_parts(flat, *MODEL_PARTS)
    return ModelSettings(replace(replica, engine=engine), scaling)


def _read_parts(flat: Mapping[str, Any], *parts: type) -> list[Any]:
    return [
        read_settings(part, {name: value for name, value in flat.items() if name in flat_names(part)})
        for part in parts
    ]
