"""`qwen3-dist render`: prints the file that runs a service on a cluster, made from the service's config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings_reader import read_settings, setting_types
from serve_app.cli.options import (
    MODEL,
    add_config_file,
    add_service_settings,
    add_settings,
    given_service,
    given_settings,
)
from serve_app.render.options import (
    ComposeOptions,
    DockerOptions,
    KubernetesOptions,
    NodeOptions,
    SlurmOptions,
    SystemdOptions,
)

HELP = "print a file for Kubernetes (KubeRay), Slurm, Docker, Compose or systemd that runs the service of a config"
# The options that each target takes.
_PARTS: dict[str, tuple[type, ...]] = {
    "kuberay": (NodeOptions, KubernetesOptions),
    "slurm": (NodeOptions, SlurmOptions),
    "docker": (DockerOptions,),
    "compose": (ComposeOptions,),
    "systemd": (SystemdOptions,),
}
_ALL = dict.fromkeys(part for parts in _PARTS.values() for part in parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", choices=_PARTS, help="what the file is for")
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    add_config_file(parser)
    shown: set[str] = set()
    for part in _ALL:
        targets = ", ".join(target for target, parts in _PARTS.items() if part in parts)
        add_settings(parser, targets, part, skip=shown)
        shown |= set(setting_types(part))
    add_service_settings(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    parts = _PARTS[args.target]
    given = given_settings(args, *_ALL)
    taken = {name for part in parts for name in setting_types(part)}
    if foreign := sorted(given.keys() - taken):
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')} is no option of {args.target}; it takes "
            + ", ".join(f"--{name.replace('_', '-')}" for name in sorted(taken))
        )
    options: list[Any] = [
        read_settings(part, {name: value for name, value in given.items() if name in setting_types(part)})
        for part in parts
    ]
    text = _renderer(args.target)(given_service(args).read(), *options)
    if args.json:
        print(json.dumps({"target": args.target, "text": text}), file=out)
    else:
        out.write(text)
    return 0


def _renderer(target: str) -> Callable[..., str]:
    from serve_app.render import compose, docker, kuberay, slurm, systemd

    renderers: dict[str, Any] = {
        "kuberay": kuberay,
        "slurm": slurm,
        "docker": docker,
        "compose": compose,
        "systemd": systemd,
    }
    found: Callable[..., str] = renderers[target].render
    return found
