"""Several kinds of GPUs beside each other: with numbers to compare them, without to find the fewest of each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.hardware import Cluster, parse_gpus
from qwen3_dist.errors import ConfigError


@dataclass(frozen=True)
class GpuKind:
    """A cluster to plan for. If not `sized`, its number of devices is to be found, and only its node counts."""

    cluster: Cluster
    sized: bool = True

    @property
    def name(self) -> str:
        """The kind of its devices."""
        return self.cluster.device.name

    @property
    def label(self) -> str:
        """The kind, and how many of it if that is given."""
        return f"{self.cluster.num_devices}x{self.name}" if self.sized else self.name


def parse_kinds(text: str) -> list[GpuKind]:
    """Parses `16xH100`, `H100`, `8xH100,4xH200` or `H100,H200,B200`. Raises ConfigError."""
    kinds = [_parse(part.strip()) for part in text.split(",")]
    if len({kind.sized for kind in kinds}) > 1:
        raise ConfigError(
            f"--gpus {text} gives a number of some kinds alone; give one for each kind, or for none"
        )
    for place, kind in enumerate(kinds):
        if kind.cluster in [other.cluster for other in kinds[:place]]:
            raise ConfigError(f"--gpus {text} gives {kind.name} twice; keep one")
    return kinds


def _parse(text: str) -> GpuKind:
    if re.fullmatch(r"[a-zA-Z]\w*", text):
        return GpuKind(parse_gpus(f"8x{text}"), sized=False)
    return GpuKind(parse_gpus(text))
