"""The service on one machine with Prometheus and Grafana, as a file of Docker Compose in `cluster/deploy/compose/`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from serve_app.render.docker import CACHE
from serve_app.render.options import ComposeOptions, NodeOptions
from serve_app.render.service import for_cluster, grace_s, service_yaml, to_yaml
from serve_app.settings import ServiceConfig

_PORT = 8000  # in the container, where Prometheus and the image's health check look for it
_CONFIG = "/etc/qwen3-dist/service.yaml"
_PROMETHEUS = "prom/prometheus:v3.5.0"
_GRAFANA = "grafana/grafana:12.1.0"
_DATASOURCE = {
    "apiVersion": 1,
    "datasources": [
        {"name": "Prometheus", "type": "prometheus", "url": "http://service:9090", "isDefault": True}
    ],
}
_DASHBOARDS = {
    "apiVersion": 1,
    "providers": [{"name": "qwen3-dist", "type": "file", "options": {"path": "/var/lib/grafana/dashboards"}}],
}


def render(config: ServiceConfig, options: ComposeOptions) -> str:
    """The file. Raises ConfigError."""
    published = config.endpoint.port
    config = for_cluster(config, NodeOptions(gpus_per_node=1 if options.gpus else 0))
    config = replace(config, endpoint=replace(config.endpoint, port=_PORT))
    return to_yaml(
        {
            "name": config.endpoint.name.lower().replace(".", "-"),
            "services": {
                "service": _service(config, options, published),
                "prometheus": {
                    "image": _PROMETHEUS,
                    # Its file names the service by this machine's own address.
                    "network_mode": "service:service",
                    "volumes": [
                        "../prometheus:/etc/prometheus:ro",
                        "prometheus:/prometheus",
                    ],
                    "depends_on": ["service"],
                },
                "grafana": {
                    "image": _GRAFANA,
                    # Only this machine reaches it, so it asks for no password.
                    "environment": {
                        "GF_AUTH_ANONYMOUS_ENABLED": "true",
                        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
                    },
                    "volumes": [
                        "../grafana/qwen3-dist.json:/var/lib/grafana/dashboards/qwen3-dist.json:ro",
                    ],
                    "configs": [
                        _mounted("datasource", "/etc/grafana/provisioning/datasources/prometheus.yaml"),
                        _mounted("dashboards", "/etc/grafana/provisioning/dashboards/qwen3-dist.yaml"),
                    ],
                    "ports": ["127.0.0.1:3000:3000"],
                    "depends_on": ["prometheus"],
                },
            },
            "configs": {
                "service": {"content": _literal(service_yaml(config))},
                "datasource": {"content": to_yaml(_DATASOURCE)},
                "dashboards": {"content": to_yaml(_DASHBOARDS)},
            },
            "volumes": {"cache": {}, "prometheus": {}},
        }
    )


def _service(config: ServiceConfig, options: ComposeOptions, published: int) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": options.image,
        "build": {"context": "../../..", "dockerfile": "cluster/deploy/docker/Dockerfile"},
        "command": ["serve", "--config", _CONFIG],
        "configs": [_mounted("service", _CONFIG)],
        "environment": {"HF_TOKEN": "${HF_TOKEN:-}"},
        "volumes": [f"cache:{CACHE}"],
        "ports": [f"127.0.0.1:{published}:{_PORT}", "127.0.0.1:9090:9090"],
        "shm_size": f"{options.shm_gib}gb",
        "init": True,
        "stop_grace_period": f"{grace_s(config)}s",
        "restart": "unless-stopped",
    }
    if options.gpus:
        devices = [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    return service


def _mounted(config: str, target: str) -> dict[str, str]:
    return {"source": config, "target": target}


def _literal(text: str) -> str:
    """`text` so that Compose replaces no variable in it."""
    return text.replace("$", "$$")
