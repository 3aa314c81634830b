"""What tokens cost: prices of GPUs by kind, and the power that their datasheets allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.hardware import Cluster
from cluster.yaml_file import read_yaml
from qwen3_dist.errors import ConfigError

_LOWEST, _HIGHEST = 1e-6, 1e9  # of a GPU-hour


def read_prices(text: str, kinds: Sequence[str]) -> dict[str, float]:
    """The price of a GPU-hour for each of `kinds`, from the value of `--price`.

    It is one number if there is one kind, pairs such as H100=2.5,H200=3.5, or a YAML file of `H100: 2.5`. Names are
    compared without case. Raises ConfigError, with file and line if a file is wrong.
    """
    found = _of_file(text) if text.endswith((".yaml", ".yml")) else _of_text(text, kinds)
    missing = [kind for kind in kinds if kind.upper() not in found]
    if missing:
        raise ConfigError(
            f"--price {text} has no price of {missing[0]}; add {missing[0]}=PRICE"
            if not text.endswith((".yaml", ".yml"))
            else f"{text} has no price of {missing[0]}; add a line `{missing[0]}: PRICE`"
        )
    return {kind: found[kind.upper()] for kind in kinds}


def costs(cluster: Cluster, tokens_per_s: float, price: float | None) -> dict[str, float]:
    """What `tokens_per_s` output tokens of the whole cluster cost: money if there is a `price` of a GPU-hour, and
    energy if the device's power is known.

    Energy counts the power that each device may draw at most, and nothing of the hosts. What is too large for a
    number, since hardly any tokens are made, is left out.
    """
    found: dict[str, float] = {}
    if price is not None and tokens_per_s:
        hour = cluster.num_devices * price
        found["cost_per_hour"] = round(hour, 4)
        found["cost_per_million_tokens"] = round(hour / (tokens_per_s * 3600) * 1e6, 4)
        found["tokens_per_currency_unit"] = round(tokens_per_s * 3600 / hour, 1)
    if cluster.device.power_w and tokens_per_s:
        watts = cluster.num_devices * cluster.device.power_w
        found["tokens_per_joule"] = round(tokens_per_s / watts, 4)
        found["kwh_per_million_tokens"] = round(watts / tokens_per_s * 1e6 / 3.6e6, 4)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _of_text(text: str, kinds: Sequence[str]) -> dict[str, float]:
    if "=" not in text:
        price = _price(text, "--price")
        if len(kinds) > 1:
            pairs = ",".join(f"{kind}={text}" for kind in kinds)
            raise ConfigError(
                f"--price {text} is one price for {len(kinds)} kinds of GPUs; write it as {pairs}"
            )
        return {kinds[0].upper(): price}
    found: dict[str, float] = {}
    for part in text.split(","):
        kind, _, value = (word.strip() for word in part.partition("="))
        if not kind or not value:
            raise ConfigError(f"--price {part!r} is not KIND=PRICE, such as H100=2.5")
        if kind.upper() in found:
            raise ConfigError(f"--price gives {kind} twice; keep one")
        found[kind.upper()] = _price(value, f"--price {kind}")
    return found


def _of_file(path: str) -> dict[str, float]:
    if not Path(path).exists():
        raise ConfigError(
            f"{path} cannot be read (No such file or directory); give a YAML file of `H100: 2.5`"
        )
    file = read_yaml(path)
    found: dict[str, float] = {}
    for kind, value in file.values.items():
        if isinstance(value, Mapping) or not isinstance(value, str):
            raise file.refusal((kind,), f"the price of {kind} must be a number, not {value!r}")
        if kind.upper() in found:
            raise file.refusal((kind,), f"there is another price of {kind.upper()}; keep one")
        try:
            found[kind.upper()] = _price(value, f"the price of {kind}")
        except ConfigError as error:
            raise file.refusal((kind,), str(error)) from None
    return found


def _price(text: str, what: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not _LOWEST <= price <= _HIGHEST:
        others = ", pairs such as H100=2.5,H200=3.5, or a .yaml file" if what == "--price" else ""
        limits = "" if not price > 0 or math.isinf(price) else f" from {_LOWEST:g} to {_HIGHEST:g}"
        raise ConfigError(f"{what} must be a positive number{limits}{others}, not {text!r}")
    return price
