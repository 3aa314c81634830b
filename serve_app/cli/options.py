"""Command-line options made from settings dataclasses, so that `--help` prints every setting there is."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.settings import KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig
from qwen3_dist.settings_reader import setting_types, value_type
from serve_app.cli import vllm_names
from serve_app.cli.parser import Switch
from serve_app.settings import (
    MODEL_PARTS,
    SERVICE_PARTS,
    EndpointSettings,
    IngressSettings,
    ReplicaSettings,
    ScalingSettings,
    TelemetrySettings,
)
from serve_app.settings.file import ServiceSource, service_source

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from qwen3_dist.config import ModelConfig


MODEL = "directory, hub id or official name (Qwen3-8B); bundled, or omitted: the bundled model"
MODEL_OR_CONFIG = (
    "directory, config.json, hub id or official name (Qwen3-8B); bundled, or omitted: the bundled model"
)


_GPUS = "number and kind of GPUs, on nodes of 8, or nodes x GPUs of each x kind"


def add_model_and_cluster(parser: argparse.ArgumentParser, gpus_help: str = _GPUS) -> None:
    """The model, of which a config.json is enough, and the machines that a prediction is for."""
    parser.add_argument(
        "model",
        nargs="?",
        default="",
        help=MODEL_OR_CONFIG,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--gpus",
        metavar="16xH100|2x8xH100",
        help=gpus_help,
    )
    where.add_argument("--cluster", metavar="FILE.yaml", help="a cluster file, as calibrate writes one")
    add_changes_of_model(parser)


def add_changes_of_model(parser: argparse.ArgumentParser) -> None:
    """The settings of `serve` that change what a model's config.json says. `changed_config` reads them."""
    parser.add_argument(
        "--hf-overrides",
        metavar="JSON",
        default="",
        help="fields in place of those of config.json, as in serve",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        default="none",
        help="what serve rounds weights to while it loads (default: none)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="what the KV cache holds, as in serve (default: auto)",
    )


def changed_config(args: argparse.Namespace, revision: str | None = None) -> tuple[str, ModelConfig]:
    """The name and the config of the model of a command line with the options of `add_changes_of_model`.

    Raises CheckpointError and ConfigError.
    """
    from cluster.planning.official import find_config, planned

    name, config = find_config(args.model, revision, HfOverrides.parse(args.hf_overrides))
    return name, planned(config, args.quantize)


def positive(text: str) -> int:
    """Raises argparse.ArgumentTypeError for what is no whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def whole(text: str) -> int:
    """Raises argparse.ArgumentTypeError for what is not a whole number of at least 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def number(
    low: float, high: float = math.inf, *, above: bool = False, below: bool = False, infinite: bool = False
) -> Callable[[str], float]:
    """A reader of numbers from `low` to `high`, without `low` if `above` and without `high` if `below`.

    The reader raises argparse.ArgumentTypeError.
    """
    least = f"above {low}" if above else f"of at least {low}"
    most = "" if math.isinf(high) else f" and below {high:g}" if below else f" and at most {high:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (value > low if above else value >= low) and (value < high if below else value <= high)
        if not inside or (math.isinf(value) and not infinite):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {least}{most}")
        return value

    return read


def given_cluster(args: argparse.Namespace) -> Cluster:
    """Raises ConfigError for what cannot be read."""
    from cluster.hardware import parse_gpus, read_cluster

    return read_cluster(args.cluster) if args.cluster else parse_gpus(args.gpus)


def add_settings(parser: argparse.ArgumentParser, title: str, cls: type, skip: Collection[str] = ()) -> None:
    """Adds `--field-name` for every field of `cls`. The values stay text: the dataclass judges them."""
    group = parser.add_argument_group(title)
    kinds = setting_types(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        kind = value_type(kinds[field.name])
        repeated = kind is LoraAdapters or typing.get_origin(kind) is Mapping
        has_default = field.default is not dataclasses.MISSING
        default = "unset" if field.default is None else str(field.default) if has_default else ""
        choices = field.metadata.get("choices")
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            action="append" if repeated else Switch if kind is bool else "store",
            default=argparse.SUPPRESS,
            metavar="|".join(choices) if choices else _metavar(kind),
            help=f"{field.metadata['help']} (default: {default or 'empty'})".replace("%", "%%"),
        )


def add_service_settings(parser: argparse.ArgumentParser) -> None:
    """Adds all settings of a service with one model, but the model itself."""
    add_settings(parser, "endpoint", EndpointSettings)
    add_settings(parser, "ingress", IngressSettings)
    add_settings(parser, "logs and traces", TelemetrySettings)
    add_settings(parser, "scaling", ScalingSettings)
    add_settings(parser, "each replica", ReplicaSettings, skip=("engine",))
    add_settings(parser, "engine of each replica", EngineConfig, skip=("model",))


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """Adds the service's file, whose settings the options override."""
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="file with the settings of a service and of its models; options win",
    )


def add_ray_address(parser: argparse.ArgumentParser) -> None:
    """Adds the address of the Ray cluster, for verbs that need one that runs."""
    parser.add_argument(
        "--ray-address",
        default="auto",
        metavar="HOST:PORT",
        help="Ray cluster to join (default: auto, the running one)",
    )


def given_service(args: argparse.Namespace) -> ServiceSource:
    """Where the settings of a service come from: `--config`, the other options, and keys in environment variables.

    Raises ConfigError.
    """
    given = given_settings(args, *MODEL_PARTS, *SERVICE_PARTS)
    if not given["model"]:  # it was left out
        del given["model"]
    return service_source(args.config, given, os.environ, vllm_names.instead_of)


def report(line: str) -> None:
    """Tells the user how far a command is."""
    print(f"qwen3-dist: {line}", file=sys.stderr, flush=True)


def given_settings(args: argparse.Namespace, *classes: type) -> dict[str, Any]:
    """The settings of `classes` that the command line named, as text."""
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(args).items() if name in names}


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Mapping:
        return "NAME=VALUE"
    names = {
        int: "N",
        float: "X",
        str: "TEXT",
        bool: "true|false",
        LoraAdapters: "NAME=PATH",
        HfOverrides: "JSON",
    }
    return names.get(kind, kind.__name__.upper())
