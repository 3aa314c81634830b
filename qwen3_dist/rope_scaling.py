"""Reads the settings of rotary position embeddings (RoPE) from a config.json, in every spelling.

transformers writes `rope_theta` and `rope_scaling` up to version 4, and `rope_parameters` since version 5. Wrong
frequencies give fluent but wrong text, so an unknown setting is an error and never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import CheckpointError, ConfigError

DEFAULT_BASE = 10_000.0  # transformers' where config.json gives none

_NUMBERS = ("factor", "beta_fast", "beta_slow", "attention_factor", "attn_factor", "mscale", "mscale_all_dim")
_FLAGS = ("truncate", "apply_yarn_scaling", "finetuned")
_YARN = {"original_max_position_embeddings", "extrapolation_factor", *_NUMBERS, *_FLAGS}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters (arXiv 2309.00071) with the names of `rope_scaling` / `rope_parameters`.

    `attention_factor` multiplies cos and sin; None means `0.1 * ln(factor) + 1`. `truncate` rounds the bounds of
    YaRN's ramp, between kept and stretched wavelengths, to whole dimensions.
    """

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def mscale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return _mscale(self.factor)

    @property
    def context_length(self) -> int:
        """The context length with scaling."""
        return int(self.original_context_length * self.factor)


def read_rope(
    raw: Mapping[str, Any], base: float | None, context_length: int | None
) -> tuple[float | None, RopeScaling | None]:
    """Returns RoPE's base and YaRN's parameters from the config.json `raw`; None for each that it does not have.

    `base` and `context_length` are the values of `raw` outside of `rope_parameters` and `rope_scaling`.
    Raises CheckpointError for settings that are not supported and ConfigError for invalid values.
    """
    settings = _settings(raw)
    kind = settings.pop("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"rope type {kind!r} is not supported; Qwen3 uses 'default' or 'yarn'")
    rotated = settings.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise CheckpointError(
            f"partial_rotary_factor={rotated!r} is not supported; Qwen3 rotates whole heads"
        )
    inner = settings.pop("rope_theta", base)
    if base is not None and inner != base:
        raise ConfigError(
            f"config.json gives two values of rope_theta: {base!r} and {inner!r}; keep one of them"
        )
    base = inner
    if base is not None and _number("rope_theta", base) <= 1:
        raise ConfigError(f"rope_theta must be a number above 1, not {base!r}")
    unknown = sorted(settings.keys() - (_YARN if kind == "yarn" else set()))
    if unknown:
        advice = "set rope_type to 'yarn'" if unknown[0] in _YARN else "leave it out"
        raise CheckpointError(f"rope type {kind!r} has no setting {unknown[0]!r}; {advice}")
    if kind == "default":
        return base, None
    return base, _yarn(settings, raw.get("original_max_position_embeddings"), context_length)


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the settings of `rope_parameters` and `rope_scaling`, without those that are null.

    A file with plain `rope_parameters` may have a `rope_scaling` too, which Qwen's model cards tell users to add.
    """
    newer, older = (_spelled(name, raw.get(name)) for name in ("rope_parameters", "rope_scaling"))
    if older and newer.get("rope_type") == "default":
        del newer["rope_type"]
    for name in sorted(newer.keys() & older.keys()):
        if newer[name] != older[name]:
            raise ConfigError(
                f"rope_parameters and rope_scaling disagree about {name}: {newer[name]!r} and {older[name]!r}; "
                "keep one of them in config.json"
            )
    return newer | older


def _spelled(where: str, given: Any) -> dict[str, Any]:
    if not given and given is not False:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object, not {given!r}")
    settings = {name: value for name, value in given.items() if value is not None}
    kind = settings.pop("type", "default")
    if settings.setdefault("rope_type", kind) != kind and kind != "default":
        raise ConfigError(
            f"{where} has type {kind!r} and rope_type {settings['rope_type']!r}; keep one of them"
        )
    return settings


def _yarn(settings: dict[str, Any], original: Any, context_length: int | None) -> RopeScaling:
    name = "original_max_position_embeddings"
    if original is not None and settings.setdefault(name, original) != original:
        raise ConfigError(f"config.json gives two values of {name}: {original!r} and {settings[name]!r}")
    length = settings.get(name, context_length)
    if not settings.get("factor") or not length:
        raise ConfigError(f"RoPE of type yarn needs factor and {name}")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(f"{name} must be a positive integer, not {length!r}")
    for flag in _FLAGS:
        if not isinstance(settings.get(flag, True), bool):
            raise ConfigError(f"{flag} of RoPE must be true or false, not {settings[flag]!r}")
    if settings.get("extrapolation_factor", 1) != 1:
        raise CheckpointError("an extrapolation_factor of RoPE other than 1 is not supported")
    numbers = {name: _number(name, settings[name]) for name in _NUMBERS if name in settings}
    for name in sorted(numbers.keys() - {"factor", "attention_factor", "attn_factor"}):
        if numbers[name] < 0:
            raise ConfigError(f"{name} of RoPE must not be negative, and is {settings[name]!r}")
    if numbers["factor"] < 1:
        raise ConfigError(f"factor of RoPE must be at least 1, not {settings['factor']!r}")
    return RopeScaling(
        factor=numbers["factor"],
        original_context_length=length,
        beta_fast=numbers.get("beta_fast") or 32.0,
        beta_slow=numbers.get("beta_slow") or 1.0,
        attention_factor=_attention_factor(numbers, settings.get("apply_yarn_scaling", True)),
        truncate=settings.get("truncate", True),
    )


def _attention_factor(numbers: Mapping[str, float], scaled: bool) -> float | None:
    """The factor of cos and sin; None for YaRN's default. It is transformers' `attention_factor`, or vLLM's
    `attn_factor` times YaRN's default (without the default unless `scaled`), or the ratio of DeepSeek's `mscale` and
    `mscale_all_dim`."""
    whole, part = numbers.get("attention_factor"), numbers.get("attn_factor")
    if whole is not None and part is not None:
        raise ConfigError("RoPE has attention_factor and attn_factor; keep one of them in config.json")
    if whole is not None and whole <= 0 or part is not None and part <= 0:
        raise ConfigError("attention_factor and attn_factor of RoPE must be positive")
    if whole is not None:
        return whole
    factor, above, below = numbers["factor"], numbers.get("mscale"), numbers.get("mscale_all_dim")
    if above and below:
        own: float | None = _mscale(factor, above) / _mscale(factor, below)
    else:
        own = None if scaled else 1.0
    return own if part is None else part * (_mscale(factor) if own is None else own)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name} of RoPE must be a number, not {value!r}")
    return float(value)
