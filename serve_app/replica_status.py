"""What a replica tells the ingresses that poll it."""

from __future__ import annotations

from typing import NamedTuple

from serve_app.request_frames import ReplicaAddress


class ReplicaStatus(NamedTuple):
    """The state of the replica with the id `replica` and the Ray actor `actor`.

    `problem` says why it is not healthy, "" if it is. `queued_tokens` of prompts wait in its engine, and it has
    `num_requests` sequences, running or waiting. `absence` says which ranks a healthy replica goes without, and why;
    "" if it has all. It takes requests at `address`.
    """

    problem: str
    queued_tokens: int = 0
    num_requests: int = 0
    replica: str = ""
    actor: str = ""
    absence: str = ""
    address: ReplicaAddress | None = None
