"""Requests of web pages: CORS for allowed origins, and a refusal of all other pages where no key is needed."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from fastapi import Request, Response

from qwen3_dist.errors import RequestError
from serve_app.settings import IngressSettings
from serve_app.settings.ingress import listed

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_OWN_PAGE = ("same-origin", "none")  # values of sec-fetch-site; none: typed or bookmarked
_METHODS = "GET, POST, DELETE"
_EXPOSED = "retry-after, x-request-id, x-should-retry"
_PREFLIGHT_AGE_S = 600


@dataclass(frozen=True)
class Origins:
    """`allowed` are the origins whose pages may use the service, `hosts` the names that a local service answers to
    beside localhost; "*" stands for any."""

    allowed: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, settings: IngressSettings) -> Origins:
        """The origins and hosts that the settings list."""
        origins = (each.rstrip("/") for each in listed(settings.cors_allow_origins))
        return cls(frozenset(origins), frozenset(listed(settings.allowed_hosts)))

    def headers(self, request: Request) -> Mapping[str, str]:
        """The response headers that let the page which sent `request` read the response; none if it may not."""
        origin = request.headers.get("origin", "")
        if not origin or not self._allows(origin):
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": _EXPOSED,
            "vary": "Origin",
        }

    def preflight(self, request: Request) -> Response | None:
        """The answer to a browser that asks whether a page may send a request; None for other requests.

        Raises RequestError (403) if it may not.
        """
        asked = request.headers.get("access-control-request-method")
        if request.method != "OPTIONS" or asked is None or not self.allowed:
            return None
        origin = request.headers.get("origin", "")
        if not self._allows(origin):
            raise _page_refused(origin)
        wanted = request.headers.get("access-control-request-headers", "authorization, content-type")
        return Response(
            status_code=HTTPStatus.NO_CONTENT,
            headers={
                "access-control-allow-methods": _METHODS,
                "access-control-allow-headers": wanted,
                "access-control-max-age": str(_PREFLIGHT_AGE_S),
            },
        )

    def check(self, request: Request) -> None:
        """Raises RequestError (403) for a request without a key that a page of another site sent.

        Browsers mark such requests. A page whose host name was rebound to a loopback address counts as the service's
        own, so the host name is checked too.
        """
        self._check_host(request)
        origin = request.headers.get("origin", "")
        if request.method in _SAFE_METHODS or (origin and self._allows(origin)):
            return
        site = request.headers.get("sec-fetch-site")
        if site in _OWN_PAGE or (not site and not origin):
            return
        page, host = _host(origin), _host("//" + request.headers.get("host", ""))
        if site or not page or page != host:
            raise _page_refused(origin)

    def _check_host(self, request: Request) -> None:
        server = request.scope.get("server") or ("",)
        if "*" in self.hosts or not _is_loopback(str(server[0])):
            return
        name = (urlsplit("//" + request.headers.get("host", "")).hostname or "").lower()
        if name and not _is_local(name) and name not in self.hosts:
            raise RequestError(
                f"a service without a key that listens on a loopback address does not answer to the host {name!r}; "
                f"ask for localhost, or start it with --allowed-hosts {name} or with --api-key",
                status=HTTPStatus.FORBIDDEN,
            )

    def _allows(self, origin: str) -> bool:
        return "*" in self.allowed or origin.lower() in self.allowed


def _page_refused(origin: str) -> RequestError:
    return RequestError(
        f"web pages of {origin or 'other sites'} may not use this service; allow them with "
        f"--cors-allow-origins {origin or 'ORIGIN'}",
        status=HTTPStatus.FORBIDDEN,
    )


def _host(url: str) -> str:
    """Host and port of `url`, without the port if it is the scheme's default."""
    return urlsplit(url).netloc.lower().removesuffix(":443").removesuffix(":80")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_local(name: str) -> bool:
    """Whether a host is one that no web page can rebind: localhost, or an address in place of a name."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
