"""A service as Ray Serve's own config: for `qwen3-dist deploy`, for KubeRay's RayService and for `serve deploy`."""

from __future__ import annotations

from typing import Any

from qwen3_dist.settings_reader import changed_settings
from serve_app.settings import INGRESS, REPLICA, ModelSettings, ServiceConfig
from serve_app.settings.options import http_options, ingress_options, model_options


def serve_schema(config: ServiceConfig) -> dict[str, Any]:
    """Serve's config of all applications, as plain values.

    An application's `args` hold what its replicas are built with: Serve starts them anew if these change. What
    changes without that stands in the options of its deployments.
    """
    endpoint = config.endpoint
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(endpoint),
        "applications": [
            {
                "name": endpoint.name,
                "route_prefix": endpoint.route_prefix,
                "import_path": "serve_app.app:build_gateway",
                "deployments": [{"name": INGRESS, **ingress_options(config)}],
            },
            *(_application(config, model) for model in config.models),
        ],
    }


def _application(config: ServiceConfig, model: ModelSettings) -> dict[str, Any]:
    replica = changed_settings(model.replica)
    engine = replica.pop("engine", {})
    engine.pop("lora", None)  # which is among the options
    return {
        "name": config.application(model),
        "route_prefix": None,
        "import_path": "serve_app.app:build_model",
        "args": {**engine, **replica, "model_name": model.name},
        "deployments": [{"name": REPLICA, **model_options(config, model)}],
    }
