"""`build_app` makes the Serve application from settings, for the CLI, `serve run` and Serve YAML files."""

from __future__ import annotations

import dataclasses
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from cluster import ray_private
from serve_app.ingress.deployment import Ingress
from serve_app.placement import place
from serve_app.replica.deployment import EngineReplica
from serve_app.settings import ServiceConfig, read_service_config

INGRESS, REPLICA = "Ingress", "EngineReplica"
QUIET_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
# A model that fails to load once fails again, so report it after the first try. This does not limit how often Serve
# replaces replicas that have run.
_CONSTRUCTOR_TRIES = 1
_INGRESS_ONGOING_REQUESTS = 10_000
_CONTROL_CALLS = 100  # concurrent calls (health, ranks, experts) that a replica answers besides its requests
# When Serve itself deletes the application, the ingress must outlive the replicas, so that their last streams end with
# an error event and not with a closed connection.
_INGRESS_OUTLIVES_S = 10.0
_RUNTIME_ENV = {"env_vars": ray_private.DEPLOYMENT_ENVIRONMENT}


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application for flat settings `args` (see `read_service_config`). Raises ConfigError, ResourceError."""
    return bind(read_service_config(args))


def bind(config: ServiceConfig) -> serve.Application:
    """The application for `config`, sized for the connected Ray cluster. Raises ResourceError."""
    ray_private.check_serve()
    placement = place(config)
    config = dataclasses.replace(config, engine=placement.engine, model_name=config.served_name)
    replicas = serve.deployment(
        name=REPLICA,
        # Admitted requests must wait in engines. Beyond this number they would wait in Serve's router, which looks for
        # free replicas only twice a second, so that engines idle while requests wait.
        max_ongoing_requests=config.max_ongoing_requests + config.max_queued_requests + _CONTROL_CALLS,
        max_queued_requests=-1,
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        ray_actor_options={**placement.actor_options, "runtime_env": _RUNTIME_ENV},
        placement_group_bundles=placement.bundles,
        placement_group_strategy="PACK",
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.scaling_target,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            metrics_interval_s=config.metrics_interval_s,
            look_back_period_s=config.look_back_period_s,
        ),
        graceful_shutdown_timeout_s=config.graceful_shutdown_timeout_s,
        health_check_period_s=config.health_check_period_s,
        health_check_timeout_s=config.health_check_timeout_s,
        logging_config=QUIET_LOGGING,
    )(EngineReplica)
    ingress = serve.deployment(
        name=INGRESS,
        max_ongoing_requests=_INGRESS_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0, "runtime_env": _RUNTIME_ENV},
        graceful_shutdown_timeout_s=config.graceful_shutdown_timeout_s + _INGRESS_OUTLIVES_S,
        health_check_period_s=config.health_check_period_s,
        health_check_timeout_s=config.health_check_timeout_s,
        logging_config=QUIET_LOGGING,
    )(Ingress)
    return ingress.bind(config, replicas.bind(config))
