"""Settings of the ingress: who may ask, how much and how long. A change reloads no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen3_dist.settings_reader import read_settings, setting
from serve_app.settings.checks import require_not_negative, require_positive


@dataclass(frozen=True)
class ServedModel:
    """One served model, as the ingress needs it.

    `application` is the Serve application that holds the model's replicas; empty: the ingress's own application.
    """

    name: str
    application: str
    adapters: tuple[str, ...]
    min_replicas: int
    max_replicas: int
    max_ongoing_requests: int
    health_check_period_s: float
    health_check_timeout_s: float


@dataclass(frozen=True)
class IngressSettings:
    """Settings that each ingress replica gets at its start, and again when they change."""

    ingress_replicas: int = setting(1, "processes that speak HTTP; if one is lost, the others go on")
    max_request_mib: float = setting(16.0, "largest HTTP request body in MiB")
    max_queued_requests: int = setting(
        1000, "sequences that may wait beyond max_ongoing_requests of all replicas; more are answered 429"
    )
    request_timeout_s: float = setting(
        0.0, "longest time a request may take, then it is answered 408; 0: no limit"
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
    api_key: str = setting("", "key that clients must send; empty: none is asked for", secret=True)
    admin_key: str = setting(
        "",
        "key for admin routes; empty: nobody may use them if there is an api_key, else everybody may",
        secret=True,
    )

    def __post_init__(self) -> None:
        require_positive(self, "ingress_replicas", "max_request_mib", "max_queued_requests")
        require_not_negative(
            self,
            "request_timeout_s",
            "body_timeout_s",
            "write_timeout_s",
            "stored_responses_mib",
            "stored_responses_s",
        )


@dataclass(frozen=True)
class IngressConfig:
    """The ingress's settings and the models it answers for: Serve's user_config of the ingress."""

    settings: IngressSettings = field(default_factory=IngressSettings)
    models: tuple[ServedModel, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as Serve keeps and compares them; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> IngressConfig:
        """Raises ConfigError naming the setting that is unknown or unusable."""
        return read_settings(cls, values)
