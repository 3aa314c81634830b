"""Settings of logs and traces. Ingresses and replicas take a change as they run."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings_reader import setting

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class TelemetrySettings:
    """What ingresses and replicas log, and where their traces go."""

    log_level: str = setting(
        "info", "least level of the lines in log files; a request's line is info", LOG_LEVELS
    )
    log_format: str = setting(
        "text", "form of the lines in log files: text, or a JSON object", ("text", "json")
    )
    log_requests: bool = setting(
        False, "whether replicas log the prompt and parameters of each request; answers are never logged"
    )
    otlp_traces_endpoint: str = setting(
        "",
        "URL that traces are sent to by OTLP over HTTP, such as http://collector:4318/v1/traces; empty: none are; "
        "needs the extra otel",
    )

    def __post_init__(self) -> None:
        url = urlsplit(self.otlp_traces_endpoint)
        if self.otlp_traces_endpoint and (url.scheme not in ("http", "https") or not url.netloc):
            raise ConfigError(
                "otlp_traces_endpoint must be an http or https URL of OTLP over HTTP, such as "
                f"http://collector:4318/v1/traces, not {self.otlp_traces_endpoint!r}"
            )

    @property
    def traces_url(self) -> str:
        """The URL of the collector's traces; OTLP's path is added to one without a path."""
        url = urlsplit(self.otlp_traces_endpoint)
        return (
            urlunsplit(url._replace(path="/v1/traces"))
            if url.path in ("", "/") and url.netloc
            else url.geturl()
        )
