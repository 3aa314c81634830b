"""The settings of a service, in parts by who needs them: ranks, replicas, the ingress, Serve."""

from serve_app.settings.ingress import IngressConfig, IngressSettings, ServedModel
from serve_app.settings.model import (
    BUNDLED_NAME,
    LiveSettings,
    LoadTargets,
    ModelSettings,
    ReplicaSettings,
    ScalingSettings,
)
from serve_app.settings.service import (
    APP_NAME,
    INGRESS,
    MODEL_PARTS,
    REPLICA,
    SERVICE_PARTS,
    EndpointSettings,
    ServiceConfig,
    flat_names,
    read_model_settings,
    read_service_config,
)
from serve_app.settings.telemetry import TelemetrySettings

__all__ = [
    "APP_NAME",
    "BUNDLED_NAME",
    "INGRESS",
    "MODEL_PARTS",
    "REPLICA",
    "SERVICE_PARTS",
    "EndpointSettings",
    "IngressConfig",
    "IngressSettings",
    "LiveSettings",
    "LoadTargets",
    "ModelSettings",
    "ReplicaSettings",
    "ScalingSettings",
    "ServedModel",
    "ServiceConfig",
    "TelemetrySettings",
    "flat_names",
    "read_model_settings",
    "read_service_config",
]
