"""What all files for clusters take from a service's config: its text, its nodes and the environment of Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import yaml

from cluster import ray_private
from qwen3_dist.errors import ConfigError, ParallelLayoutError
from qwen3_dist.settings_reader import changed_settings
from serve_app.ingress import proxy
from serve_app.render.options import NodeOptions
from serve_app.settings import ModelSettings, ServiceConfig

# Environment of every Ray node of a service.
ENVIRONMENT = {**ray_private.CLUSTER_ENVIRONMENT, ray_private.PROXY_MIDDLEWARES: proxy.IMPORT_PATH}
# Seconds that a service needs beyond `graceful_shutdown_timeout_s` to end.
_END_S = 60
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def service_values(config: ServiceConfig) -> dict[str, Any]:
    """The settings of `config` that are not at their defaults, as `read_service_config` takes them."""
    shared = {**changed_settings(config.endpoint), **changed_settings(config.ingress)}
    models = []
    for model in config.models:
        replica = changed_settings(model.replica)
        models.append({**replica.pop("engine", {}), **replica, **changed_settings(model.scaling)})
    return {**models[0], **shared} if len(models) == 1 else {**shared, "models": models}


def service_yaml(config: ServiceConfig) -> str:
    """The service's file for `config`."""
    return to_yaml(service_values(config))


def to_yaml(value: Any) -> str:
    """YAML with keys in the given order; text of several lines stands as such."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110)


def for_cluster(config: ServiceConfig, nodes: NodeOptions) -> ServiceConfig:
    """`config` as the nodes run it: reachable from outside, and on GPUs unless it asks for CPUs.

    A model that chose its device by the nodes that have joined would compute on CPUs if it was deployed before them.
    Raises ConfigError if `config` holds a secret, since the files that are rendered are no place for one.
    """
    refuse_secrets(config)
    host = "0.0.0.0" if config.endpoint.host in _LOOPBACK else config.endpoint.host
    return replace(
        config,
        endpoint=replace(config.endpoint, host=host),
        models=tuple(_on_device(model, nodes) for model in config.models),
    )


def refuse_secrets(config: ServiceConfig) -> None:
    """Raises ConfigError if a setting that is a secret is set."""
    for field in fields(config.ingress):
        if field.metadata.get("secret") and getattr(config.ingress, field.name):
            raise ConfigError(
                f"{field.name} is a secret and would be readable in the rendered file; leave it out of the config "
                "and keep it in a Secret, an environment file or a file of keys that only the service can read",
                (field.name,),
            )


def node_range(config: ServiceConfig, nodes: NodeOptions) -> tuple[int, int]:
    """The nodes that `min_replicas` and `max_replicas` of all models need.

    Raises ParallelLayoutError if a tp group fits no node, ConfigError if `nodes.nodes` is too few.
    """
    fewest, most = (
        _nodes_for(list(_groups(config, nodes, scaled)), nodes.gpus_per_node) for scaled in ("min", "max")
    )
    if nodes.nodes is None:
        return fewest, most
    if nodes.nodes < most:
        raise ConfigError(
            f"nodes={nodes.nodes} of {nodes.gpus_per_node} GPUs are too few for max_replicas of all models, which "
            f"take {most}; give more nodes, or lower max_replicas or the layout"
        )
    return (nodes.nodes if fewest == most else fewest), nodes.nodes


def takes_gpus(config: ServiceConfig) -> bool:
    """Whether any model's ranks run on GPUs."""
    return any(model.replica.engine.device != "cpu" for model in config.models)


def grace_s(config: ServiceConfig) -> int:
    """Seconds that the service may take to end once it is told to."""
    return math.ceil(config.graceful_shutdown_timeout_s) + _END_S


def _on_device(model: ModelSettings, nodes: NodeOptions) -> ModelSettings:
    engine = model.replica.engine
    device = engine.device if engine.device != "auto" else "cuda" if nodes.gpus_per_node else "cpu"
    return replace(model, replica=replace(model.replica, engine=replace(engine, device=device)))


def _groups(config: ServiceConfig, nodes: NodeOptions, scaled: str) -> Iterator[int]:
    """The GPUs of each tp group of all replicas."""
    for model in config.models:
        engine, scaling = model.replica.engine, model.scaling
        if engine.device == "cpu":
            continue
        layout = engine.layout
        if layout.tp > nodes.gpus_per_node:
            raise ParallelLayoutError(
                f"{model.name}: a tp group of {layout} takes {layout.tp} GPUs of one node and nodes have "
                f"{nodes.gpus_per_node}; lower tp to {nodes.gpus_per_node} or less and raise dp or pp"
                if nodes.gpus_per_node
                else f"{model.name}: device=cuda needs GPUs and gpus_per_node=0; set device=cpu or gpus_per_node"
            )
        replicas = scaling.max_replicas if scaled == "max" else scaling.min_replicas
        yield from [layout.tp] * (replicas * layout.world // layout.tp)


def _nodes_for(groups: list[int], gpus_per_node: int) -> int:
    """Nodes that hold `groups` of GPUs, each whole: the largest first, each on the first node with room."""
    free: list[int] = []
    for group in sorted(groups, reverse=True):
        place = next((place for place, left in enumerate(free) if left >= group), None)
        if place is None:
            place = len(free)
            free.append(gpus_per_node)
        free[place] -= group
    return max(1, len(free))


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
