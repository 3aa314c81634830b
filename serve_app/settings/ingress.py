"""Settings of the ingress: who may ask, how much and how long. A change reloads no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings_reader import read_settings, setting
from serve_app.settings.checks import require_not_negative, require_positive
from serve_app.settings.keys import check_hash, hash_key
from serve_app.settings.telemetry import TelemetrySettings


@dataclass(frozen=True)
class ServedModel:
    """One served model, as the ingress needs it.

    `application` is the Serve application that holds the model's replicas; empty: the ingress's own application.
    `asleep` is the level of sleep that it was put to, `weights` what it got in place of its own weights.
    """

    name: str
    application: str
    adapters: tuple[str, ...]
    min_replicas: int
    max_replicas: int
    max_ongoing_requests: int
    health_check_period_s: float
    health_check_timeout_s: float
    asleep: int = 0
    weights: str = ""


@dataclass(frozen=True)
class IngressSettings:
    """Settings that each ingress replica gets at its start, and again when they change."""

    ingress_replicas: int = setting(
        1, "processes that speak HTTP and always run; if one is lost, the others go on"
    )
    max_ingress_replicas: int | None = setting(
        None, "most processes that speak HTTP that load may start; null: as many as ingress_replicas"
    )
    ingress_target_requests: float = setting(
        200.0, "requests in flight per process that speaks HTTP that scaling aims for, open streams counted"
    )
    max_request_mib: float = setting(16.0, "largest HTTP request body in MiB")
    max_queued_requests: int = setting(
        1000, "sequences that may wait beyond max_ongoing_requests of all replicas; more are answered 429"
    )
    max_queued_tokens: int | None = setting(
        None,
        "tokens of prompts that may wait in each replica's engine; a request that comes while others wait and would "
        "make it more is answered 429; null: any number",
    )
    queue_timeout_s: float = setting(
        0.0,
        "longest time a request may wait in an engine's queue before it runs, then it is answered 429; 0: no limit",
    )
    cache_per_key: bool = setting(
        False,
        "whether prompts share cached prefixes only with prompts of the same key, as if the key were their salt",
    )
    request_timeout_s: float = setting(
        0.0, "longest time a request may take, then it is answered 408; 0: no limit"
    )
    resume_timeout_s: float = setting(
        300.0,
        "longest time that a request whose replica was lost waits for another, then it fails; 0: it fails at once",
    )
    body_timeout_s: float = setting(
        60.0, "longest time a request's body may take to come, then it is answered 408; 0: no limit"
    )
    write_timeout_s: float = setting(
        30.0, "longest time a client may leave an answer unread, then its request ends; 0: no limit"
    )
    stored_responses_mib: float = setting(
        256.0, "memory in MiB for responses that later requests may refer to; 0: none are stored"
    )
    stored_responses_s: float = setting(
        86400.0, "seconds for which a response that is not referred to stays stored"
    )
    api_key: str = setting(
        "",
        "key that clients must send, or sha256: and its hash; empty: no key is needed unless there is a keys_file",
        secret=True,
    )
    admin_key: str = setting(
        "",
        "key for admin routes, or sha256: and its hash; empty: admin keys of the keys_file alone, or everybody if "
        "the service has no keys",
        secret=True,
    )
    keys_file: str = setting(
        "",
        "YAML file of keys with names and limits, on each node with an ingress; read again when it changes",
    )
    admin_metrics: bool = setting(False, "whether /metrics needs an admin key; otherwise it needs no key")
    cors_allow_origins: str = setting(
        "", "origins, separated by commas, whose web pages may use the service from a browser; *: any"
    )
    allowed_hosts: str = setting(
        "",
        "host names, separated by commas, to which a service without keys answers on loopback addresses, beside "
        "localhost; *: any",
    )

    def __post_init__(self) -> None:
        require_positive(
            self,
            "ingress_replicas",
            "ingress_target_requests",
            "max_request_mib",
            "max_queued_requests",
            "max_queued_tokens",
        )
        if self.most_ingress_replicas < self.ingress_replicas:
            raise ConfigError(
                f"max_ingress_replicas={self.max_ingress_replicas} must not be less than "
                f"ingress_replicas={self.ingress_replicas}"
            )
        require_not_negative(
            self,
            "queue_timeout_s",
            "request_timeout_s",
            "resume_timeout_s",
            "body_timeout_s",
            "write_timeout_s",
            "stored_responses_mib",
            "stored_responses_s",
        )
        if 0 < self.request_timeout_s <= self.queue_timeout_s:
            raise ConfigError(
                f"queue_timeout_s={self.queue_timeout_s:g} must be less than "
                f"request_timeout_s={self.request_timeout_s:g}, which would end the request first"
            )
        check_hash("api_key", self.api_key)
        check_hash("admin_key", self.admin_key)
        for origin in listed(self.cors_allow_origins):
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/]+/?", origin):
                raise ConfigError(
                    f"cors_allow_origins must be * or origins such as https://example.com, not {origin!r}"
                )

    @property
    def most_ingress_replicas(self) -> int:
        """Most processes that speak HTTP."""
        return self.ingress_replicas if self.max_ingress_replicas is None else self.max_ingress_replicas

    def with_hashes(self) -> IngressSettings:
        """These settings with the hashes of keys in place of the keys."""
        return replace(self, api_key=hash_key(self.api_key), admin_key=hash_key(self.admin_key))


def listed(text: str) -> tuple[str, ...]:
    """The parts, in lower case, of a setting that is separated by commas."""
    return tuple(part.strip().lower() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class IngressConfig:
    """The ingress's settings, the models it answers for, logs and traces: Serve's user_config of the ingress."""

    settings: IngressSettings = field(default_factory=IngressSettings)
    models: tuple[ServedModel, ...] = ()
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as Serve keeps and compares them; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> IngressConfig:
        """Raises ConfigError naming the setting that is unknown or unusable."""
        return read_settings(cls, values)
