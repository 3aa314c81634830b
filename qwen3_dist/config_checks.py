"""Checks of what config.json says, and its `quantization_config` in all spellings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwen3_dist.errors import CheckpointError, ConfigError


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raises ConfigError if `value` is no integer from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be {'a positive' if least else 'an'} integer, not {value!r}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, not {value!r}")


def check_keys(config: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(name for name in config.keys() - known if config[name]):
        raise CheckpointError(
            f"{unknown[0]}={config[unknown[0]]!r} is not understood; remove it if it changes no weight"
        )


def check(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], are: str) -> None:
    if config.get(name) not in allowed:
        raise CheckpointError(f"{name}={config.get(name)!r} is not supported; {are} supported")


def block(value: Any, name: str) -> tuple[int, int] | None:
    """Two sizes, as a list or, as older tools wrote them, "128x128"; None if there are none."""
    if value is None:
        return None
    if isinstance(value, str) and all(size.isdecimal() for size in value.split("x")):
        value = [int(size) for size in value[:40].split("x")]
    sizes = list(value) if isinstance(value, list | tuple) else []
    if len(sizes) != 2 or any(
        not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes
    ):
        raise CheckpointError(f"{name} is {value!r} where two positive integers are expected")
    return sizes[0], sizes[1]


def strings(config: Mapping[str, Any], name: str) -> list[str]:
    value = config.get(name) or []
    if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
        raise CheckpointError(f"{name} is {value!r} where a list of names is expected")
    for each in value:
        try:
            re.compile(each.removeprefix("re:") if each.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(f"{name} has {each!r}, which is no regular expression ({error})") from None
    return value
