"""How an engine treats a request, whatever it computes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestTerms:
    """Requests of lower `priority` run first; among equals those of different `client`s take turns.

    Prompts share cached prefixes only with prompts of the same `cache_salt`. A request that has waited
    `queue_timeout_s` seconds without running is refused; 0: no limit. `suspect` is an id that the prompts of
    a client's request share if it ran when its last engine was lost: no step of a dp group holds it before the suspect
    ahead has a token, so one alone of each dp group is to blame if this engine is lost too.
    """

    priority: int = 0
    client: str = ""
    cache_salt: str = ""
    queue_timeout_s: float = 0.0
    suspect: str = ""

    def salt(self, adapter: str) -> bytes:
        """What the hashes of cached blocks begin with: each pair of a salt and an `adapter`'s digest has its own."""
        return repr((adapter, self.cache_salt)).encode() if adapter or self.cache_salt else b""


DEFAULT_TERMS = RequestTerms()
