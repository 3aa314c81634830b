"""From a plan to a service: the settings that run its best layout, as a command line and as files."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_dist.errors import ConfigError
from qwen3_dist.step_defaults import STEP_DEFAULTS

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.planner import PlannedLayout, PlanRequest
    from serve_app.settings import ServiceConfig

TARGETS = ("serve", "kuberay", "slurm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("deployment of the best layout")
    group.add_argument(
        "--render",
        choices=TARGETS,
        help="print its file instead of the plan: the YAML of serve --config and deploy, a RayService of KubeRay, or "
        "a script of Slurm",
    )
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="write the file of --render there, and print the plan too"
    )


def settings(
    args: argparse.Namespace, cluster: Cluster, request: PlanRequest, best: PlannedLayout
) -> dict[str, str]:
    """The settings of a service with the layout and the limits that were planned, as `serve` takes them."""
    found = {"model": _model(args.model), "layout": str(best.layout)}
    if best.replicas > 1:
        found |= {"min_replicas": str(best.replicas), "max_replicas": str(best.replicas)}
    for name, default in (("hf_overrides", ""), ("quantize", "none"), ("kv_cache_dtype", "auto")):
        value = getattr(args, name)
        if value != default:
            found[name] = value
    if request.drafted:
        found["speculative"] = f"ngram,k={request.drafted}"
    found["max_num_batched_tokens"] = str(request.max_num_batched_tokens)
    # As many requests as were planned for may run at once, where the defaults allow fewer.
    in_replica = min(ceil(best.concurrency / best.replicas), best.max_batch)
    in_group = ceil(in_replica / best.layout.dp)
    if in_group > STEP_DEFAULTS[cluster.device_kind].max_num_seqs:
        found["max_num_seqs"] = str(in_group)
    if in_replica > _most_ongoing():
        found["max_ongoing_requests"] = str(in_replica)
    return found


def serve_lines(found: Mapping[str, str], multi_node: bool) -> list[str]:
    """The command that serves the best layout, and what it needs on several nodes."""
    options = [
        word
        for name, value in found.items()
        if name != "model"
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    words = ["qwen3-dist", "serve", found["model"] or "bundled", *options]
    lines = ["To serve the best layout:", f"  {shlex.join([*words, *_RAY] if multi_node else words)}"]
    if multi_node:
        lines.append("  after `ray start` on every node, with the model's files at the same path on each")
    return lines


def left_out(request: PlanRequest) -> str:
    """What was planned and the settings do not have, as a sentence; empty if they have all."""
    if not request.lora_rank:
        return ""
    return (
        "Add your adapters with --lora NAME=PATH, or `lora:` in a file: the plan does not know their names."
    )


def rendered(target: str, found: Mapping[str, str], cluster: Cluster) -> str:
    """The file of `target` that runs a service with these settings on `cluster`. Raises ConfigError."""
    from serve_app.render import kuberay, slurm
    from serve_app.render.options import KubernetesOptions, NodeOptions, SlurmOptions
    from serve_app.render.service import service_yaml
    from serve_app.settings import read_service_config

    on_gpus = not cluster.shared_host
    nodes = NodeOptions(gpus_per_node=min(cluster.devices_per_node, cluster.num_devices) if on_gpus else 0)
    config = read_service_config({name: value for name, value in found.items() if value})
    _check_reads_back(config)
    if target == "kuberay":
        return kuberay.render(config, nodes, KubernetesOptions())
    if target == "slurm":
        return slurm.render(config, nodes, SlurmOptions())
    return service_yaml(config)


def write(text: str, file: Path) -> None:
    """Writes a rendered file. Raises ConfigError."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); choose another --out") from None
    print(f"qwen3-dist: written to {file}", file=sys.stderr)


_RAY = ("--ray-address", "auto")


def _model(model: str) -> str:
    """What `serve` takes where `plan` was given a config.json: its directory."""
    return str(Path(model).parent) if model and Path(model).is_file() else model


def _most_ongoing() -> int:
    from serve_app.settings import ScalingSettings

    return ScalingSettings().max_ongoing_requests


def _check_reads_back(config: ServiceConfig) -> None:
    """Raises ConfigError unless the file of `config` is read as the same config."""
    import yaml

    from serve_app.render.service import service_yaml
    from serve_app.settings import read_service_config

    values: dict[str, Any] = yaml.safe_load(service_yaml(config))
    if read_service_config(values) != config:
        raise ConfigError(
            "the rendered service does not read back as it was planned; report this command line"
        )
