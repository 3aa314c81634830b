"""The applications of Ray Serve that a typed config becomes: the gateway, which holds the ingress, and one for each
model.

A model in an application of its own is loaded, changed and removed without the others noticing. `build_app` puts an
ingress and one model into one application, for `serve run` and Serve's YAML files.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from cluster import ray_private
from qwen3_dist.errors import ConfigError, ResourceError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.weights_version import WeightsVersion
from serve_app.ingress.deployment import Ingress
from serve_app.placement import place
from serve_app.replica.deployment import EngineReplica
from serve_app.settings import (
    INGRESS,
    REPLICA,
    ModelSettings,
    ServiceConfig,
    read_model_settings,
    read_service_config,
)
from serve_app.settings.options import ingress_options, model_options

_log = logging.getLogger(__name__)
_POLL_S = 2.0
QUIET_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
# A model that fails to load fails the next time too: say so after the first try. Once a replica has
# run, Serve goes on replacing lost ones whatever this is.
_CONSTRUCTOR_TRIES = 1
_RUNTIME_ENV = {"env_vars": ray_private.DEPLOYMENT_ENVIRONMENT}


def build_app(args: dict[str, Any]) -> serve.Application:
    """One application with an ingress and one model, for flat settings `args` (see `read_service_config`).

    Raises ConfigError, ResourceError.
    """
    config = read_service_config(args)
    if len(config.models) > 1:
        raise ConfigError(
            "build_app serves one model; deploy several with `qwen3-dist deploy --config FILE.yaml`"
        )
    [model] = config.models
    return _ingress(config, in_one_application=True).bind({model.name: _replicas(config, model)})


def build_gateway(args: dict[str, Any]) -> serve.Application:
    """The gateway application, for flat settings `args` of a whole service. Raises ConfigError."""
    return gateway(read_service_config(args))


def build_model(args: dict[str, Any]) -> serve.Application:
    """One model's replicas alone, for flat settings `args` of it. Raises ConfigError, ResourceError.

    KubeRay deploys as soon as its head is ready and never tries again. So this waits up to `start_timeout_s` for the
    nodes that a replica needs.
    """
    config = ServiceConfig((read_model_settings(args),))
    [model] = config.models
    deadline = time.monotonic() + model.replica.engine.start_timeout_s
    while True:
        try:
            return _replicas(config, model)
        except ResourceError as error:
            if not ray.is_initialized() or time.monotonic() > deadline:
                raise
            _log.warning("%s waits for nodes: %s", model.name, error)
        time.sleep(_POLL_S)


def applications(config: ServiceConfig) -> list[serve.RunTarget]:
    """The applications of a service, sized for the Ray cluster this process is connected to.

    Raises ResourceError if the cluster can never hold them.
    """
    endpoint = config.endpoint
    front = serve.RunTarget(gateway(config), name=endpoint.name, route_prefix=endpoint.route_prefix)
    return [
        front,
        *(
            serve.RunTarget(_replicas(config, model), name=config.application(model), route_prefix=None)
            for model in config.models
        ),
    ]


def gateway(config: ServiceConfig) -> serve.Application:
    """The gateway application: an ingress that finds the models' replicas in their own applications."""
    return _ingress(config).bind()


def _replicas(config: ServiceConfig, model: ModelSettings) -> serve.Application:
    ray_private.check_serve()
    placement = place(model, config.models)
    engine = dataclasses.replace(  # LiveSettings have them
        placement.engine, lora=LoraAdapters(), weights=WeightsVersion()
    )
    replica = dataclasses.replace(model.replica, engine=engine, model_name=model.name)
    deployment = serve.deployment(
        name=REPLICA,
        max_constructor_retry_count=_CONSTRUCTOR_TRIES,
        ray_actor_options={**placement.actor_options, "runtime_env": _RUNTIME_ENV},
        placement_group_bundles=placement.bundles,
        placement_group_strategy="PACK",
        logging_config=QUIET_LOGGING,
        **model_options(config, model),
    )(EngineReplica)
    return deployment.bind(replica)


def _ingress(config: ServiceConfig, in_one_application: bool = False) -> serve.Deployment:
    return serve.deployment(
        name=INGRESS,
        ray_actor_options={"num_cpus": 0, "runtime_env": _RUNTIME_ENV},
        logging_config=QUIET_LOGGING,
        **ingress_options(config, in_one_application),
    )(Ingress)
