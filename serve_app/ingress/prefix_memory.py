"""Which replicas have computed the start of a prompt, as far as this ingress has sent them prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from hashlib import blake2b
from itertools import chain, count

_STEP_BYTES = 256
_STEPS = 32  # beyond them each length is a quarter longer than the one before
_GROWTH = 1.25
_MAX_PREFIXES = 2**16
_HASH_BYTES = 8

Prefixes = list[tuple[int, bytes]]  # their lengths and hashes, the shortest first


class PrefixMemory:
    """Remembers the newest `max_prefixes` prefixes, by their hashes, in about 130 bytes each."""

    def __init__(self, max_prefixes: int = _MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._replicas: OrderedDict[bytes, frozenset[str]] = OrderedDict()
        self._same: dict[frozenset[str], frozenset[str]] = {}  # equal sets are one object

    def add(self, prompt: Prefixes, replica: str) -> None:
        """Notes that `replica` computes `prompt`."""
        for _, key in prompt:
            known = self._replicas.get(key, frozenset())
            if replica not in known:
                known = self._one(known | {replica})
            self._replicas[key] = known
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_prefixes:
            self._replicas.popitem(last=False)

    def shared_bytes(self, prompt: Prefixes, replicas: Collection[str]) -> dict[str, int]:
        """For each of `replicas` the bytes that `prompt` begins with and that it has computed before."""
        shared = dict.fromkeys(replicas, 0)
        for length, key in prompt:
            known = self._replicas.get(key)
            if known is None:
                break
            shared |= dict.fromkeys(known & shared.keys(), length)
        return shared

    def forget(self, replica: str) -> None:
        """Notes that `replica` is gone, and its cache with it."""
        self._same.clear()
        for key, known in self._replicas.items():
            self._replicas[key] = self._one(known - {replica})

    def _one(self, replicas: frozenset[str]) -> frozenset[str]:
        return self._same.setdefault(replicas, replicas)


def prefixes_of(prompt: bytes) -> Prefixes:
    """The prefixes of `prompt` that are remembered."""
    lengths = chain(
        (_STEP_BYTES * step for step in range(1, _STEPS + 1)),
        (int(_STEP_BYTES * _STEPS * _GROWTH**step) for step in count(1)),
    )
    prefixes: Prefixes = []
    digest, start = blake2b(digest_size=_HASH_BYTES), 0
    for length in lengths:
        if length > len(prompt):
            return prefixes
        digest.update(prompt[start:length])
        prefixes.append((length, digest.digest()))
        start = length
    return prefixes
