"""Weights that take the place of those in the model's directory, written `step-120=/checkpoints/120`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qwen3_dist.errors import ConfigError

_NAME = re.compile(r"[\w.:/@+-]{1,128}")


@dataclass(frozen=True)
class WeightsVersion:
    """The directory that weights are loaded from, "" for the model's own, and the name of their version.

    `WeightsVersion.parse` is the inverse of `str`, which leaves out `digest`. An engine adds it: it tells weights
    apart by the contents of their files.
    """

    path: str = ""
    version: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.path and not _NAME.fullmatch(self.version):
            raise ConfigError(
                f"weights have the version {self.version!r}; use up to 128 letters, digits and . : / @ + - _"
            )
        if self.version and not self.path:
            raise ConfigError(f"weights {self.version} need a directory")

    @classmethod
    def parse(cls, given: Any) -> WeightsVersion:
        """Reads `version=directory`, a directory, whose name is the version then, or a mapping of one version to its
        directory. Raises ConfigError."""
        if isinstance(given, WeightsVersion):
            return given
        if isinstance(given, Mapping) and len(given) == 1:
            [(version, path)] = given.items()
            given = f"{version}={path}"
        if not isinstance(given, str):
            raise ConfigError(f"weights has {given!r} where version=directory is expected")
        version, equals, path = given.partition("=")
        return cls(path.strip(), version.strip()) if equals else cls.of(given.strip())

    @classmethod
    def of(cls, path: str, version: str = "") -> WeightsVersion:
        """The weights in the directory `path`, whose name is the version if there is none. Raises ConfigError."""
        return cls(path, version or PurePath(path).name)

    def __str__(self) -> str:
        return f"{self.version}={self.path}" if self.path else ""

    def is_like(self, other: WeightsVersion) -> bool:
        """Whether both have the same directory and version; their files may differ."""
        return (self.path, self.version) == (other.path, other.version)
