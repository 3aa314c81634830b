"""The LoRA adapters of an engine, written `french=adapters/french`. Values validate themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import ConfigError, RequestError

_MOST_ADAPTERS = 256


@dataclass(frozen=True)
class LoraAdapters:
    """The adapters that every rank loads, as pairs of a name and a directory or hub id.

    `LoraAdapters.parse` is the inverse of `str`, which leaves out `digests`. An engine adds these: they tell adapters
    apart by the contents of their files.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.pairs) > _MOST_ADAPTERS:
            raise ConfigError(f"lora has {len(self.pairs)} adapters; use at most {_MOST_ADAPTERS}")
        for name, path in self.pairs:
            if not re.fullmatch(r"[\w.:/@+-]{1,128}", name):
                raise ConfigError(
                    f"lora {name!r} is not a valid name; use up to 128 letters, digits and . : / @ + - _"
                )
            if not path or "," in path:
                raise ConfigError(f"lora {name} has {path!r} where a path without commas is expected")
            if self.names.count(name) > 1:
                raise ConfigError(f"lora names {name} twice; give each adapter a name of its own")

    @classmethod
    def parse(
        cls, given: str | Mapping[str, str] | list[Any] | tuple[Any, ...] | LoraAdapters
    ) -> LoraAdapters:
        """Reads `a=path,b=path`, a mapping of names to paths, or a list of these. Raises ConfigError."""
        if isinstance(given, LoraAdapters):
            return given
        return cls(tuple(_pairs(given)))

    def __str__(self) -> str:
        return ",".join(f"{name}={path}" for name, path in self.pairs)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.pairs]

    def digest(self, name: str | None) -> str:
        """What tells the weights of adapter `name` from others; "" for None and for an unknown name."""
        return dict(zip(self.names, self.digests, strict=True)).get(name or "", "")

    def number(self, name: str | None) -> int:
        """The number of adapter `name` in plans, from 1; 0 for None. Raises RequestError (404) for an unknown name."""
        if name is None:
            return 0
        if name not in self.names:
            known = f"the adapters are {', '.join(self.names)}" if self.pairs else "there are no adapters"
            raise RequestError(f"{name!r} is not a LoRA adapter here; {known}", param="model", status=404)
        return 1 + self.names.index(name)


@dataclass(frozen=True)
class NextAdapters:
    """The adapters that ranks are to hold. Of each of `adapters`, `kept` has the place where the ranks have it now, or
    None if it is to be read. Behind them come those at the places `leaving`, which sequences still use."""

    adapters: LoraAdapters
    kept: tuple[int | None, ...]
    leaving: tuple[int, ...] = ()


def _pairs(given: Any) -> list[tuple[str, str]]:
    if isinstance(given, Mapping) and all(isinstance(each, str) for item in given.items() for each in item):
        return list(given.items())
    if isinstance(given, list | tuple):
        return [pair for each in given for pair in _pairs(each)]
    parts = [part.strip() for part in given.split(",")] if isinstance(given, str) else [given]
    pairs = []
    for part in parts if given != "" else []:
        if not isinstance(part, str) or "=" not in part:
            raise ConfigError(f"lora has {part!r} where name=path is expected")
        name, _, path = part.partition("=")
        pairs.append((name.strip(), path.strip()))
    return pairs
