"""Options of our deployments that Serve changes while replicas run, as plain values of its config."""

from __future__ import annotations

from typing import Any

from serve_app.settings.model import LiveSettings, ModelSettings
from serve_app.settings.service import EndpointSettings, ServiceConfig

# Concurrent control calls (health, ranks, experts), allowed even when a replica is full of requests.
_CONTROL_CALLS = 100
_INGRESS_ONGOING_REQUESTS = 10_000
_DELAYS = ("upscale_delay_s", "downscale_delay_s", "metrics_interval_s", "look_back_period_s")
_LOAD_POLICY = "serve_app.scaling:load_policy"
# Where Serve ends the application itself, replicas go first: their last streams then end with an error, not a cut.
_INGRESS_OUTLIVES_S = 10.0


def http_options(endpoint: EndpointSettings) -> dict[str, Any]:
    """Options of Serve's HTTP proxies."""
    tls = {"ssl_certfile": endpoint.ssl_certfile, "ssl_keyfile": endpoint.ssl_keyfile}
    return {"host": endpoint.host, "port": endpoint.port, **(tls if endpoint.ssl_certfile else {})}


def model_options(config: ServiceConfig, model: ModelSettings) -> dict[str, Any]:
    """Options of a model's deployment."""
    scaling, engine = model.scaling, model.replica.engine
    live = LiveSettings(config.telemetry, scaling.load_targets, engine.lora, engine.weights)
    return {
        "user_config": live.to_json(),
        # Requests do not pass through Serve, but while no replica runs each asks it for one. Those beyond this number
        # would wait in Serve's router, which looks for room twice a second.
        "max_ongoing_requests": scaling.max_ongoing_requests
        + config.ingress.max_queued_requests
        + _CONTROL_CALLS,
        "max_queued_requests": -1,
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            # A deployment shows whether the model loads, also if it may sleep.
            **({} if scaling.min_replicas else {"initial_replicas": 1}),
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.scaling_target,
            **{name: getattr(scaling, name) for name in _DELAYS},
            # Also without targets: Serve loads the model again where the policy changes.
            "policy": {"policy_function": _LOAD_POLICY},
        },
        "max_surge_percent": scaling.max_surge_percent or 0,
        "graceful_shutdown_timeout_s": scaling.graceful_shutdown_timeout_s,
        "health_check_period_s": scaling.health_check_period_s,
        "health_check_timeout_s": scaling.health_check_timeout_s,
    }


def ingress_options(config: ServiceConfig, in_one_application: bool = False) -> dict[str, Any]:
    """Options of the ingress."""
    scalings = [model.scaling for model in config.models]
    return {
        "user_config": config.ingress_config(in_one_application).to_json(),
        "max_ongoing_requests": _INGRESS_ONGOING_REQUESTS,
        # Also for a fixed number: Serve restarts replicas when autoscaling comes or goes.
        "autoscaling_config": {
            "min_replicas": config.ingress.ingress_replicas,
            "max_replicas": config.ingress.most_ingress_replicas,
            "target_ongoing_requests": config.ingress.ingress_target_requests,
            **{name: max(getattr(scaling, name) for scaling in scalings) for name in _DELAYS},
        },
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s + _INGRESS_OUTLIVES_S,
        "health_check_period_s": min(scaling.health_check_period_s for scaling in scalings),
        "health_check_timeout_s": max(scaling.health_check_timeout_s for scaling in scalings),
    }
