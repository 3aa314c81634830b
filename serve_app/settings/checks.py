"""Checks that several parts of the settings make."""

from __future__ import annotations

from typing import Any

from qwen3_dist.errors import ConfigError


def require_not_negative(settings: Any, *names: str) -> None:
    """Raises ConfigError for the first setting of `names` that is less than 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 0:
            raise ConfigError(f"{name} must not be negative, not {value!r}")


def require_positive(settings: Any, *names: str) -> None:
    """Raises ConfigError for the first setting of `names` that is 0 or less."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be positive, not {value!r}")
