"""`ServiceConfig`: everything one served model needs to know, its engine's settings included.

`read_service_config` takes it flat, as `serve run` arguments, YAML `args` and the command line give it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings, setting, setting_types
from qwen3_dist.text.tool_calls.tags import ToolCallForm
from qwen3_dist.weights.source import canonical_name

BUNDLED_NAME = "qwen3-bundled"
APP_NAME = "qwen3_dist"
_TARGET = 16.0  # requests in flight per replica, where nothing is said


@dataclass(frozen=True)
class ServiceConfig:
    """One model behind one OpenAI-compatible endpoint, on `min_replicas` to `max_replicas` engines."""

    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    model_name: str = setting("", "name clients ask for; empty means the hub id or the directory's name")
    name: str = setting(APP_NAME, "name of the Serve application; each service of a Ray cluster has another")
    route_prefix: str = setting("/", "path below which the service answers, beside others of its Ray cluster")
    host: str = setting("127.0.0.1", "address the HTTP server listens on; 0.0.0.0 for every interface")
    port: int = setting(8000, "port the HTTP server listens on")
    min_replicas: int = setting(1, "engines that always run")
    max_replicas: int = setting(1, "most engines that load may start")
    target_ongoing_requests: float | None = setting(
        None,
        "requests in flight per replica that scaling aims for; null: 16, or max_ongoing_requests if that is less",
    )
    max_ongoing_requests: int = setting(
        256, "requests in flight that each replica adds to the limit, each choice of each prompt counted"
    )
    upscale_delay_s: float = setting(10.0, "seconds of high load before a replica is added")
    downscale_delay_s: float = setting(300.0, "seconds of low load before a replica is removed")
    metrics_interval_s: float = setting(2.0, "seconds between two reports of a replica's load")
    look_back_period_s: float = setting(10.0, "seconds of load that a scaling decision averages")
    graceful_shutdown_timeout_s: float = setting(
        600.0, "longest wait for running requests when a replica stops"
    )
    health_check_period_s: float = setting(1.0, "seconds between two health checks of a replica")
    health_check_timeout_s: float = setting(30.0, "longest wait for one health check")
    placement_timeout_s: float = setting(120.0, "longest wait for the cluster to make room for a replica")
    max_request_mib: float = setting(16.0, "largest HTTP request body in MiB")
    max_queued_requests: int = setting(
        1000, "requests in flight beyond those, counted likewise; more are answered 429"
    )
    request_timeout_s: float = setting(
        0.0, "longest time a request may take, then it is answered 408; 0: any"
    )
    body_timeout_s: float = setting(
        60.0, "longest time a request's body may take to come, then it is answered 408; 0: any"
    )
    write_timeout_s: float = setting(
        30.0, "longest time a client may leave an answer unread, then its request ends; 0: any"
    )
    stream_parts_per_s: int | None = setting(
        None,
        "parts of answers that a replica sends per second; where its tokens are more, parts hold several; "
        "0: never; null: 500 if ranks compute on the CPUs that send them, else 2500",
    )
    stored_responses_mib: float = setting(
        256.0, "memory in MiB for responses that later requests may refer to; 0: none are stored"
    )
    stored_responses_s: float = setting(
        86400.0, "seconds for which a response that is not referred to stays stored"
    )
    api_key: str = setting("", "key that clients must send; empty: none is asked for", secret=True)
    admin_key: str = setting(
        "",
        "key for what changes the service; empty: nobody may if there is an api_key, else all may",
        secret=True,
    )
    enable_thinking: bool | None = setting(
        None, "whether models that can think do where a request does not say; null: as their template has it"
    )
    tool_calls: str = setting(
        "auto",
        "form of the model's tool calls: json as Qwen3's, xml as Qwen3-Coder's; auto is the chat template's",
        ("auto", "json", "xml"),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_s", "_mib")) and value is not None and value < 0:
                raise ConfigError(f"{field.name} must not be negative, not {value!r}")
        for name in (
            "max_replicas",
            "target_ongoing_requests",
            "max_ongoing_requests",
            "max_request_mib",
            "max_queued_requests",
            "metrics_interval_s",
            "look_back_period_s",
            "health_check_period_s",
            "health_check_timeout_s",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, not {value!r}")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name must be letters, digits, '_', '-' and '.', not {self.name!r}")
        if not re.fullmatch(r"/|(/[\w.~-]+)+", self.route_prefix):
            raise ConfigError(f"route_prefix must be a path such as / or /small, not {self.route_prefix!r}")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port must lie between 1 and 65535, not {self.port}")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} must lie between 1 and max_replicas={self.max_replicas}"
            )
        if self.served_name in self.engine.lora.names:
            raise ConfigError(
                f"lora names {self.served_name}, which the model itself is called; choose another name"
            )
        target = self.target_ongoing_requests or 0
        if target > self.max_ongoing_requests and self.max_replicas > self.min_replicas:
            raise ConfigError(
                f"target_ongoing_requests={target:g} is more than "
                f"max_ongoing_requests={self.max_ongoing_requests}, so load could never add a replica"
            )

    @property
    def scaling_target(self) -> float:
        """Requests in flight per replica that scaling aims for."""
        return min(self.target_ongoing_requests or _TARGET, self.max_ongoing_requests)

    @property
    def tool_call_form(self) -> ToolCallForm | None:
        """The form of tool calls that was set; None if the chat template is to tell it."""
        return None if self.tool_calls == "auto" else cast(ToolCallForm, self.tool_calls)

    @property
    def parts_per_s(self) -> float:
        """Most parts of answers per second, as AsyncEngine takes it, once the device is decided."""
        by_device = 500 if self.engine.device == "cpu" else 2500
        return (by_device if self.stream_parts_per_s is None else self.stream_parts_per_s) or math.inf

    @property
    def served_name(self) -> str:
        """The name clients ask for."""
        model = canonical_name(self.engine.model)
        if self.model_name or not model:
            return self.model_name or BUNDLED_NAME
        return Path(model).resolve().name if Path(model).is_dir() else model


def read_service_config(args: Mapping[str, Any]) -> ServiceConfig:
    """Builds a config from flat `args`, the engine's settings beside the service's.

    Values may be text (`"4"` for an integer, `"null"`), as a command line has it; `engine` may also
    be a mapping of its own. Raises ConfigError naming the setting that is unknown or unusable.
    """
    service = setting_types(ServiceConfig).keys() - {"engine"}
    engine = setting_types(EngineConfig).keys()
    nested = args.get("engine", {})
    if not isinstance(nested, Mapping):
        raise ConfigError(f"engine must be a mapping of engine settings, not {nested!r}")
    flat = {name: value for name, value in args.items() if name != "engine"} | dict(nested)
    unknown = sorted(set(flat) - set(service) - set(engine))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(service | engine))}")
    engine_config = read_settings(EngineConfig, {n: v for n, v in flat.items() if n in engine})
    service_config = read_settings(ServiceConfig, {n: v for n, v in flat.items() if n in service})
    return dataclasses.replace(service_config, engine=engine_config)
