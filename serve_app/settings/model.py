"""Settings of one served model: what a replica is built with, and how many replicas there are."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from qwen3_dist.errors import ConfigError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import setting
from qwen3_dist.text.tool_calls.tags import ToolCallForm
from qwen3_dist.weights.source import canonical_name
from qwen3_dist.weights_version import WeightsVersion
from serve_app.settings.checks import require_not_negative, require_positive
from serve_app.settings.telemetry import TelemetrySettings

BUNDLED_NAME = "qwen3-bundled"
_TARGET = 16.0  # requests in flight per replica, where nothing is said


@dataclass(frozen=True)
class ReplicaSettings:
    """What one replica is built with. If any of it changes, Serve starts new replicas, which load the model again."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    model_name: str = setting("", "name clients ask for; empty means the hub id or the directory's name")
    enable_thinking: bool | None = setting(
        None, "default for requests that do not set it; null: the chat template's default"
    )
    tool_calls: str = setting(
        "auto",
        "form of the model's tool calls: json as Qwen3's, xml as Qwen3-Coder's; auto is the chat template's",
        ("auto", "json", "xml"),
    )
    stream_parts_per_s: int | None = setting(
        None,
        "parts of answers that a replica sends per second; where its tokens are more, parts hold several; "
        "0: no limit; null: 500 if ranks compute on the CPUs that send them, else 2500",
    )

    metrics_prefix: str = setting(
        "vllm", "what the names of metrics that vLLM has too begin with, in place of vLLM's own"
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "stream_parts_per_s")
        if not re.fullmatch(r"[a-zA-Z_]\w*", self.metrics_prefix, re.ASCII):
            raise ConfigError(f"metrics_prefix must be letters, digits and '_', not {self.metrics_prefix!r}")
        if self.served_name in self.engine.lora.names:
            raise ConfigError(
                f"lora names {self.served_name}, which the model itself is called; choose another name"
            )

    @property
    def served_name(self) -> str:
        """The name clients ask for."""
        model = canonical_name(self.engine.model)
        if self.model_name or not model:
            return self.model_name or BUNDLED_NAME
        return Path(model).resolve().name if Path(model).is_dir() else model

    @property
    def tool_call_form(self) -> ToolCallForm | None:
        """The form of tool calls that was set; None if the chat template is to tell it."""
        return None if self.tool_calls == "auto" else cast(ToolCallForm, self.tool_calls)

    @property
    def parts_per_s(self) -> float:
        """Most parts of answers per second, as AsyncEngine takes it, once the device is decided."""
        by_device = 500 if self.engine.device == "cpu" else 2500
        return (by_device if self.stream_parts_per_s is None else self.stream_parts_per_s) or math.inf


@dataclass(frozen=True)
class ScalingSettings:
    """How many replicas a model has and how Serve looks after them. A change reloads nothing."""

    min_replicas: int = setting(
        1,
        "engines that always run; with 0 the last one ends after downscale_delay_s without requests, and the next "
        "request waits until another has loaded the model",
    )
    max_replicas: int = setting(1, "most engines that load may start")
    target_ongoing_requests: float | None = setting(
        None,
        "requests in flight per replica that scaling aims for; null: 16, or max_ongoing_requests if that is less",
    )
    max_ongoing_requests: int = setting(
        256, "requests in flight that each replica adds to the limit, each choice of each prompt counted"
    )
    target_tokens: int | None = setting(
        None,
        "tokens of waiting and running sequences per replica that scaling aims for; null: they do not count",
    )
    target_kv_usage: float | None = setting(
        None,
        "share of each replica's KV cache that scaling aims for, with what waiting sequences will need; null: it does "
        "not count",
    )
    target_ttft_s: float | None = setting(
        None,
        "seconds to the first token, in nine of ten requests, above which replicas are added; null: they do not count",
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
    max_surge_percent: int | None = setting(
        None,
        "replicas, in percent of those that run, that a deployment starts before old ones end; with 0 an old one ends "
        "first; null: as many as GPUs are free for, and 0 on CPUs, where two would share the memory",
    )

    def __post_init__(self) -> None:
        require_not_negative(
            self, "upscale_delay_s", "downscale_delay_s", "graceful_shutdown_timeout_s", "placement_timeout_s"
        )
        require_positive(
            self,
            "max_replicas",
            "target_ongoing_requests",
            "max_ongoing_requests",
            "target_tokens",
            "target_kv_usage",
            "target_ttft_s",
            "metrics_interval_s",
            "look_back_period_s",
            "health_check_period_s",
            "health_check_timeout_s",
        )
        if not 0 <= (self.max_surge_percent or 0) <= 100:
            raise ConfigError(f"max_surge_percent={self.max_surge_percent} must lie between 0 and 100")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} must lie between 0 and max_replicas={self.max_replicas}"
            )
        if (self.target_kv_usage or 0) > 1:
            raise ConfigError(f"target_kv_usage must be a share of at most 1, not {self.target_kv_usage!r}")
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
    def load_targets(self) -> LoadTargets:
        """What scaling aims for beside the requests in flight."""
        return LoadTargets(self.target_tokens, self.target_kv_usage, self.target_ttft_s)


@dataclass(frozen=True)
class LoadTargets:
    """The load per replica that scaling aims for; what is None does not count."""

    tokens: int | None = None
    kv_usage: float | None = None
    ttft_s: float | None = None


@dataclass(frozen=True)
class LiveSettings:
    """What a replica takes up as it runs: Serve's user_config of it."""

    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    targets: LoadTargets = field(default_factory=LoadTargets)
    lora: LoraAdapters = field(default_factory=LoraAdapters)
    weights: WeightsVersion = field(default_factory=WeightsVersion)
    asleep: int = 0  # the level of sleep

    def to_json(self) -> dict[str, Any]:
        """Plain values, as Serve keeps and compares them."""
        return {**asdict(self), "lora": str(self.lora), "weights": str(self.weights)}


@dataclass(frozen=True)
class ModelSettings:
    """One served model."""

    replica: ReplicaSettings = field(default_factory=ReplicaSettings)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)

    @property
    def name(self) -> str:
        """The name clients ask for."""
        return self.replica.served_name
