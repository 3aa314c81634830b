"""What a replica tells the ingresses that poll it."""

from __future__ import annotations

from typing import NamedTuple


class ReplicaStatus(NamedTuple):
    """The state of the replica with the id `replica` and the Ray actor `actor`.

    `problem` says why it is not healthy, "" if it is. `queued_tokens` of prompts wait in its engine, and it has
    `num_requests` sequences, running or waiting. `absence` says which ranks a healthy replica goes without, and why;
    "" if it has all.
    """

    problem: str
    queued_tokens: int = 0
    num_requests: int = 0
    replica: str = ""
    actor: str = ""
    absence: str = ""
