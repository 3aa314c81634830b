"""The GPU of a rank. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU. `uuid` is unique among all hosts; `free_bytes` is its free memory when the rank started."""

    uuid: str
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int

    @property
    def kind(self) -> tuple[str, tuple[int, int]]:
        return self.name, self.capability

    def __str__(self) -> str:
        return f"{self.uuid} ({self.name})"
