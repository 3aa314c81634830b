"""A service as a RayService (`ray.io/v1`) of KubeRay.

The head runs no ranks. Workers are alike, each with all GPUs of a node, and as many as the layouts need. KubeRay sends
Serve its config once the head is ready, so the head keeps KubeRay's own probes: `/ready` there would wait for itself.
"""

from __future__ import annotations

import re
from typing import Any

from cluster import ray_private
from qwen3_dist.errors import ConfigError
from serve_app.launch.schema import serve_schema
from serve_app.render.options import KubernetesOptions, NodeOptions
from serve_app.render.service import ENVIRONMENT, for_cluster, grace_s, node_range, takes_gpus, to_yaml
from serve_app.settings import ServiceConfig

SECRETS = "/etc/qwen3-dist/secrets"
_UPGRADES = {
    "new_cluster": "NewCluster",
    "incremental": "NewClusterWithIncrementalUpgrade",
    "none": "None",
}
_LONGEST_NAME = 47  # KubeRay's limit
_HEAD = {"cpu": "4", "memory": "16Gi"}
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


def render(config: ServiceConfig, nodes: NodeOptions, options: KubernetesOptions) -> str:
    """The manifest. Raises ConfigError, ParallelLayoutError."""
    config = for_cluster(config, nodes)
    fewest, most = node_range(config, nodes)
    scales = fewest != most or options.upgrade == "incremental"
    gpus = nodes.gpus_per_node if takes_gpus(config) else 0
    worker = _pod(config, options, "ray-worker", _worker_resources(nodes, gpus))
    _container(worker)["readinessProbe"] = _ready_probe(config)
    if gpus and options.gpu_type:
        worker["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": options.gpu_type}
    if gpus:
        worker["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    return to_yaml(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": {"name": _name(config), "namespace": options.namespace},
            "spec": {
                "upgradeStrategy": _upgrade(options),
                "rayClusterDeletionDelaySeconds": grace_s(config),
                "excludeHeadPodFromServeSvc": True,
                "serveConfigV2": to_yaml(serve_schema(config)),
                "rayClusterConfig": {
                    "rayVersion": ray_private.TESTED_WITH,
                    "enableInTreeAutoscaling": scales,
                    "headGroupSpec": {
                        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
                        "template": _pod(config, options, "ray-head", {"requests": _HEAD, "limits": _HEAD}),
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": "ranks",
                            "replicas": fewest,
                            "minReplicas": fewest,
                            "maxReplicas": most,
                            "rayStartParams": {"num-cpus": str(nodes.cpus_per_node), "num-gpus": str(gpus)},
                            "template": worker,
                        }
                    ],
                },
            },
        }
    )


def _pod(
    config: ServiceConfig, options: KubernetesOptions, container: str, resources: dict[str, Any]
) -> dict[str, Any]:
    """The template of a pod with one container that drains its Ray node before it ends."""
    grace = grace_s(config)
    volumes = _volumes(options)
    ports = {"serve": config.endpoint.port} if container == "ray-worker" else {}
    ports |= _PORTS if container == "ray-head" else {"metrics": _PORTS["metrics"]}
    drain = ["python", "-m", "cluster.nodes", "drain", "--timeout-s", str(grace - 30)]
    spec = {
        "name": container,
        "image": options.image,
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [{"name": name, "value": value} for name, value in ENVIRONMENT.items()],
        "resources": resources,
        "volumeMounts": [
            {"name": name, "mountPath": path, **({"readOnly": True} if name != "shm" else {})}
            for name, (path, _) in volumes.items()
        ],
        "lifecycle": {"preStop": {"exec": {"command": drain}}},
    }
    if options.secret_env:
        spec["envFrom"] = [{"secretRef": {"name": options.secret_env}}]
    return {
        "spec": {
            "terminationGracePeriodSeconds": grace,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "containers": [spec],
            "volumes": [{"name": name, **source} for name, (_, source) in volumes.items()],
        }
    }


def _volumes(options: KubernetesOptions) -> dict[str, tuple[str, dict[str, Any]]]:
    """Where each volume is mounted, and what it is, by its name."""
    volumes: dict[str, tuple[str, dict[str, Any]]] = {
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": f"{options.shm_gib}Gi"}})
    }
    if options.checkpoint_claim:
        claim = {"claimName": options.checkpoint_claim, "readOnly": True}
        volumes["checkpoint"] = (options.checkpoint_path, {"persistentVolumeClaim": claim})
    if options.checkpoint_host_path:
        directory = {"path": options.checkpoint_host_path, "type": "Directory"}
        volumes["checkpoint"] = (options.checkpoint_path, {"hostPath": directory})
    if options.secret_files:
        volumes["secrets"] = (SECRETS, {"secret": {"secretName": options.secret_files, "defaultMode": 0o440}})
    return volumes


def _worker_resources(nodes: NodeOptions, gpus: int) -> dict[str, Any]:
    amounts = {"cpu": str(nodes.cpus_per_node), "memory": f"{nodes.memory_gib}Gi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": amounts}


def _ready_probe(config: ServiceConfig) -> dict[str, Any]:
    """The pod gets requests once the service answers over it; never, if it has no replica and so no proxy of Serve."""
    path = f"{config.endpoint.route_prefix.rstrip('/')}/ready"
    return {
        "httpGet": {"path": path, "port": "serve"},
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": 2,
    }


def _upgrade(options: KubernetesOptions) -> dict[str, Any]:
    strategy: dict[str, Any] = {"type": _UPGRADES[options.upgrade]}
    if options.upgrade == "incremental":
        strategy["clusterUpgradeOptions"] = {
            "gatewayClassName": options.gateway_class,
            "maxSurgePercent": 100,
            "stepSizePercent": options.upgrade_step_percent,
            "intervalSeconds": options.upgrade_interval_s,
        }
    return strategy


def _name(config: ServiceConfig) -> str:
    """The service's name as Kubernetes takes it. Raises ConfigError if it cannot be written so."""
    name = re.sub(r"[^a-z0-9-]", "-", config.endpoint.name.lower())
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"name={config.endpoint.name!r} cannot be the name of a RayService; choose up to {_LONGEST_NAME} letters "
            "and digits that begin with a letter"
        )
    return name


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    [container] = pod["spec"]["containers"]
    found: dict[str, Any] = container
    return found
