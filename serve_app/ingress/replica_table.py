"""What an ingress knows of a model's replicas, and which of them takes a request."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from serve_app.ingress.prefix_memory import PrefixMemory, prefixes_of
from serve_app.replica_status import ReplicaStatus
from serve_app.request_frames import ReplicaAddress

TOKENS_OF_REQUEST = 256  # as many tokens of waiting prompts count as much as a sequence that a replica has
MAX_SHARED_TOKENS = 8192  # so a shared prefix draws a replica at most 32 requests more than others have
BYTES_OF_TOKEN = 4  # of a prompt, about


class ReplicaTable:
    """`addresses` has those of the replicas that take requests, by their ids."""

    def __init__(self) -> None:
        self.addresses: dict[str, ReplicaAddress] = {}
        self._prefixes = PrefixMemory()
        self._load: dict[str, int] = {}  # in tokens, at the last poll
        self._sent: Counter[str] = Counter()  # tokens since
        self._avoided: set[str] = set()

    def update(self, told: Sequence[ReplicaStatus], silent: Iterable[str]) -> None:
        """Takes up a poll: what replicas told, and the ids of those that did not answer."""
        silent = set(silent)
        self._load = {
            status.replica: status.queued_tokens + TOKENS_OF_REQUEST * status.num_requests for status in told
        }
        self._sent.clear()
        self._avoided = {status.replica for status in told if status.problem} | silent
        if told:
            self.addresses = {each: at for each, at in self.addresses.items() if each in silent}
        for status in told:
            self.learn(status)

    def learn(self, status: ReplicaStatus) -> None:
        """Notes where a replica takes requests."""
        if status.address is not None:
            self.addresses[status.replica] = status.address

    def avoid(self, replica: str) -> None:
        """Sends `replica` nothing, while there are others, until a poll finds it healthy."""
        self._avoided.add(replica)

    def forget(self, replica: str) -> None:
        """Notes that `replica` is gone."""
        self._avoided.add(replica)
        self._prefixes.forget(replica)
        self.addresses.pop(replica, None)

    def choose(self, replicas: Sequence[str], prompt: bytes) -> str:
        """The id of the best of the `replicas` for a request, which is counted as having it.

        The best has the fewest tokens to compute before the request's first token: those of other requests, and those
        of its `prompt` that it has not computed before.
        """
        prefixes = prefixes_of(prompt)
        usable = [each for each in replicas if each not in self._avoided] or list(replicas)
        shared = self._prefixes.shared_bytes(prefixes, usable)
        tokens = {each: min(shared[each] // BYTES_OF_TOKEN, MAX_SHARED_TOKENS) for each in usable}
        load = {each: self._load.get(each, 0) + self._sent[each] - tokens[each] for each in usable}
        least = min(load.values())
        best = random.choice([each for each in usable if load[each] == least])
        self._prefixes.add(prefixes, best)
        self._sent[best] += TOKENS_OF_REQUEST + len(prompt) // BYTES_OF_TOKEN - tokens[best]
        return best
