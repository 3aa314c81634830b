"""What a cluster's files need beyond the service's settings; the options of `qwen3-dist render`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings_reader import setting
from serve_app.settings.checks import require_not_negative, require_positive

UPGRADES = ("new_cluster", "incremental", "none")


@dataclass(frozen=True)
class NodeOptions:
    """The machines that ranks run on."""

    gpus_per_node: int = setting(8, "GPUs of each node")
    nodes: int | None = setting(
        None, "most nodes; by the layouts, max_replicas and gpus_per_node if unset, 1 for CPU ranks"
    )
    cpus_per_node: int = setting(32, "CPU cores that the service takes on each node")
    memory_gib: int = setting(256, "host memory in GiB that the service takes on each node")

    def __post_init__(self) -> None:
        require_positive(self, "nodes", "cpus_per_node", "memory_gib")
        require_not_negative(self, "gpus_per_node")


@dataclass(frozen=True)
class KubernetesOptions:
    """A RayService of KubeRay."""

    image: str = setting("qwen3-dist:latest", "container image, built from the Dockerfile of `render docker`")
    namespace: str = setting("default", "namespace of Kubernetes")
    gpu_type: str = setting("", "value of the node label nvidia.com/gpu.product to run on; empty: any node")
    checkpoint_claim: str = setting(
        "", "PersistentVolumeClaim mounted at checkpoint_path on every pod; empty: none"
    )
    checkpoint_host_path: str = setting(
        "", "directory of each node mounted at checkpoint_path on every pod; empty: none"
    )
    checkpoint_path: str = setting("/models", "where pods see the checkpoints that they mount")
    secret_env: str = setting(
        "", "Secret whose entries are environment variables of every pod, such as HF_TOKEN; empty: none"
    )
    secret_files: str = setting(
        "", "Secret whose entries are files in /etc/qwen3-dist/secrets of every pod; empty: none"
    )
    shm_gib: int = setting(16, "size in GiB of /dev/shm, which Ray's object store and CPU ranks use")
    upgrade: str = setting(
        "new_cluster",
        "how a changed file is rolled out: beside the running cluster and at once, or in steps through a gateway",
        UPGRADES,
    )
    gateway_class: str = setting("istio", "GatewayClass that upgrade=incremental moves requests through")
    upgrade_step_percent: int = setting(25, "share of requests that upgrade=incremental moves at a time")
    upgrade_interval_s: int = setting(60, "seconds between two steps of upgrade=incremental")

    def __post_init__(self) -> None:
        require_positive(self, "shm_gib", "upgrade_step_percent", "upgrade_interval_s")
        if self.upgrade not in UPGRADES:
            raise ConfigError(f"upgrade must be one of {', '.join(UPGRADES)}, not {self.upgrade!r}")
        if self.upgrade_step_percent > 100:
            raise ConfigError(f"upgrade_step_percent must be at most 100, not {self.upgrade_step_percent}")
        if self.checkpoint_claim and self.checkpoint_host_path:
            raise ConfigError("checkpoint_claim and checkpoint_host_path exclude each other; leave one out")


@dataclass(frozen=True)
class SlurmOptions:
    """A job of Slurm."""

    partition: str = setting("", "partition of Slurm; empty: its default")
    account: str = setting("", "account that the job is charged to; empty: the user's default")
    time_limit: str = setting("7-00:00:00", "longest time of the job, as Slurm writes it")
    prologue: str = setting(
        "", "shell commands before anything else, such as `source /opt/qwen3-dist/bin/activate`"
    )
    ray_port: int = setting(6379, "port of the Ray head on the job's first node")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time_limit):
            raise ConfigError(f"time_limit must be a time such as 7-00:00:00, not {self.time_limit!r}")


@dataclass(frozen=True)
class DockerOptions:
    """A container image."""

    base_image: str = setting(
        "nvidia/cuda:13.0.1-base-ubuntu24.04", "image to build on: Ubuntu or Debian with Python 3.11 or 3.12"
    )


@dataclass(frozen=True)
class ComposeOptions:
    """The service, Prometheus and Grafana on one machine."""

    image: str = setting("qwen3-dist:latest", "container image, built from the Dockerfile of `render docker`")
    gpus: bool = setting(False, "give the service all GPUs of the machine")
    shm_gib: int = setting(4, "size in GiB of /dev/shm, which Ray's object store and CPU ranks use")

    def __post_init__(self) -> None:
        require_positive(self, "shm_gib")


@dataclass(frozen=True)
class SystemdOptions:
    """A unit of systemd."""

    executable: str = setting("/opt/qwen3-dist/bin/qwen3-dist", "path of the installed command")
    user: str = setting("qwen3-dist", "user that the service runs as; systemd makes it where it is missing")
    environment_file: str = setting(
        "/etc/qwen3-dist/environment", "file with secrets as NAME=VALUE, such as HF_TOKEN; it may be missing"
    )
