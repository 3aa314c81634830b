"""What a rank says of its GPU. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU. `uuid` tells it from all others, in this host and elsewhere; `free_bytes` is as a rank found it."""

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
