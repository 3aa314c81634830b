"""The fields of bodies that say how an engine treats a request."""

from __future__ import annotations

from qwen3_dist.request_terms import RequestTerms
from serve_app.apis.shared.body import Body, CacheSalt, Priority


class TermsBody(Body):
    """The fields that all bodies of requests to an engine share."""

    priority: Priority = 0
    cache_salt: CacheSalt | None = None

    @property
    def terms(self) -> RequestTerms:
        """The terms that the client asks for."""
        return RequestTerms(self.priority, cache_salt=self.cache_salt or "")
