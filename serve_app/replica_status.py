"""What a replica tells the ingresses that poll it."""

from __future__ import annotations

from typing import NamedTuple


class ReplicaStatus(NamedTuple):
    """Why the replica is not healthy, "" if it is, and how many tokens of prompts wait in its engine."""

    problem: str
    queued_tokens: int = 0
