"""The applications of Serve that were deployed by config (`qwen3-dist deploy`, KubeRay), and changes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster import ray_private

Config = dict[str, Any]  # of one application, as ServeApplicationSchema has it


def deployed_configs() -> dict[str, Config]:
    """The configs of the applications, by name."""
    client = ray_private.serve_client()
    details = client.get_serve_details() if client else {"applications": {}}
    return {
        name: app["deployed_app_config"]
        for name, app in details["applications"].items()
        if app.get("deployed_app_config") and app["status"] != ApplicationStatus.DELETING
    }


def apply_configs(applications: Iterable[Config], **of_serve: Any) -> None:
    """Makes these the applications of Serve that are deployed by config. `of_serve` are its own options."""
    schema = {"applications": list(applications), **of_serve}
    ray_private.apply_serve_config(ServeDeploySchema.model_validate(schema))
