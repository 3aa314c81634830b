"""Environment variables of ranks: the setting `rank_env`, and OpenMP's variables of CPU ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from qwen3_dist.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFUSED = {
    "CUDA_VISIBLE_DEVICES": "which the launcher sets for each rank",
    "OMP_NUM_THREADS": "which threads_per_rank sets",
    "PATH": "which ranks need unchanged",
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        "which the engine sets",
    ),
}
_AT_START = ("LD_", "PYTHON")

# How often an idle OpenMP thread spins before it sleeps: some 20 microseconds. The default is milliseconds, in which
# it blocks a core that other threads may need.
_SPIN = {"GOMP_SPINCOUNT": "1000"}


def openmp_environment() -> dict[str, str]:
    """OpenMP's variables for the start of a rank's process; empty if the operator has set them."""
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    return {} if chosen else dict(_SPIN)


def parse_rank_env(given: Any) -> dict[str, str]:
    """Reads a mapping, a string NAME=VALUE or a list of such strings. Returns values by name. Raises ConfigError."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, (list, tuple)) and all(isinstance(item, str) for item in given):
        if wrong := [item for item in given if "=" not in item]:
            raise ConfigError(f"rank_env must be NAME=VALUE, not {wrong[0]!r}")
        pairs = [(name, value) for name, _, value in (item.partition("=") for item in given)]
    else:
        raise ConfigError(f"rank_env must map names to values, not {given!r}")
    variables: dict[str, str] = {}
    for name, value in pairs:
        _check(name, value)
        if name in variables:
            raise ConfigError(f"rank_env sets {name} twice; leave one of them out")
        variables[name] = value
    return variables


def _check(name: Any, value: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"rank_env must name variables with letters, digits and _, not {name!r}")
    if not isinstance(value, str):
        raise ConfigError(f"the value of {name} in rank_env must be a string, not {value!r}; quote numbers")
    if "\0" in value:
        raise ConfigError(f"rank_env gives {name} a value with a NUL character; leave it out")
    if why := _REFUSED.get(name):
        raise ConfigError(f"rank_env must not set {name}, {why}")
    if name.startswith(_AT_START):
        raise ConfigError(
            f"rank_env must not set {name}, which a process reads only as it starts; set it for the whole service"
        )
