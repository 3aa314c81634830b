"""`Access`: finds the key of each request and decides whether the request may go on."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from fastapi import Request, Response

from qwen3_dist.errors import ConfigError, RequestError
from qwen3_dist.request_terms import RequestTerms
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.ingress.access.limits import Clock, KeyLimits
from serve_app.ingress.access.origins import Origins
from serve_app.ingress.http import add_headers, needs_no_key, route_path
from serve_app.settings import IngressSettings
from serve_app.settings.keys import ADMIN_KEY, API_KEY, Key, hash_key, hash_of, read_keys

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
_POLL_S = 1.0
_KEY = "qwen3_dist.key"
_ADMIN_PREFIXES = ("/v1/cluster/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # of POST requests
_METRICS = "/metrics"
Signature = tuple[int, int, int] | None  # of a file: time of change, size and inode; None if it is missing


@dataclass(frozen=True)
class KnownKey:
    """A key and what it has used of its limits."""

    key: Key
    limits: KeyLimits


class Access:
    """The keys of a service and the limits of each.

    `num_ingresses` is the number of ingress processes, among which limits are divided evenly.
    """

    def __init__(self, num_ingresses: Callable[[], int] = lambda: 1, clock: Clock = time.monotonic) -> None:
        self._num_ingresses, self._clock = num_ingresses, clock
        self._settings = IngressSettings()
        self._origins = Origins()
        self._file_keys: tuple[Key, ...] = ()
        self._signature: Signature = None
        self._known: tuple[KnownKey, ...] = ()
        self._watch: asyncio.Task[None] | None = None

    def configure(self, settings: IngressSettings) -> None:
        """Takes up changed settings. Raises ConfigError if there is a new keys file that cannot be read."""
        if settings.keys_file != self._settings.keys_file:
            signature = _signature(settings.keys_file)
            self._file_keys = read_keys(settings.keys_file) if settings.keys_file else ()
            self._signature = signature
        self._settings, self._origins = settings, Origins.of(settings)
        self._take_keys()

    def watch_keys_file(self) -> None:
        """Begins to read the keys file again whenever it changes. Needs a running event loop."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._poll())

    def reload(self) -> None:
        """Reads the keys file if it changed. If it cannot be read, logs why and keeps the keys."""
        path = self._settings.keys_file
        signature = _signature(path)
        if not path or signature == self._signature:
            return
        self._signature = signature
        try:
            self._file_keys = read_keys(path)
        except ConfigError as error:
            logger.error("the keys stay as they were, since the keys file is unusable: %s", error)
            return
        self._take_keys()
        logger.warning("the keys file %s has %d keys now", path, len(self._file_keys))

    def check(self, request: Request) -> Response | None:
        """Notes the key of a request. Returns a response if the request asks for nothing more than whether a page may
        send another one.

        Raises RequestError if the key is missing or wrong (401), if it does not suffice, or for a page of another
        site (403).
        """
        add_headers(request, self._origins.headers(request))
        if answer := self._origins.preflight(request):
            return answer
        known = request.scope[_KEY] = self._find(request)
        key = known.key if known else None
        for_admins = self.is_admins(request)
        if needs_no_key(request) and not for_admins:
            return None
        if for_admins and self._keys_needed(admin=True):
            self._check_admin(key)
        elif key is None and self._keys_needed():
            raise RequestError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY or as x-api-key",
                status=HTTPStatus.UNAUTHORIZED,
            )
        if key is None:
            self._origins.check(request)
        return None

    def check_limits(self, request: Request) -> None:
        """Counts a request towards the limits of its key. Raises KeyLimitError (429)."""
        if known := _known(request):
            known.limits.check(known.key, self._share())

    def running(self, request: Request) -> AbstractContextManager[None]:
        """A context in which the request runs. Raises KeyLimitError (429)."""
        known = _known(request)
        return known.limits.running(known.key, self._share()) if known else nullcontext()

    def charge(self, request: Request, tokens: int) -> None:
        """Counts the tokens of an answered request towards the limits of its key."""
        if known := _known(request):
            known.limits.charge(tokens)

    def with_terms(self, request: Request, parsed: T) -> T:
        """Returns the parsed request on the terms of its key and of the service: with the best priority that the key
        allows, and the key's name as the client."""
        if not isinstance(parsed, GenerationRequest | PoolingRequest):
            return parsed
        known, terms, settings = _known(request), parsed.terms, self._settings
        best = known.key.min_priority if known else None
        name = known.key.name if known else ""
        terms = RequestTerms(
            terms.priority if best is None else max(best, terms.priority),
            name,
            f"{name}/{terms.cache_salt}" if settings.cache_per_key and name else terms.cache_salt,
            settings.queue_timeout_s,
        )
        return parsed if terms == parsed.terms else dataclasses.replace(parsed, terms=terms)

    def is_admins(self, request: Request) -> bool:
        """Whether the request is for an admin route."""
        path = route_path(request)
        if path == _METRICS:
            return self._settings.admin_metrics
        return request.method == "POST" and path.startswith(_ADMIN_PREFIXES)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await asyncio.to_thread(self.reload)
            except Exception:
                logger.exception("the keys file could not be read again; the keys stay as they were")

    def _take_keys(self) -> None:
        settings = self._settings
        own = [
            Key(name, hash_key(key), admin=name == ADMIN_KEY)
            for name, key in ((API_KEY, settings.api_key), (ADMIN_KEY, settings.admin_key))
            if key
        ]
        limits = {each.key.name: each.limits for each in self._known}
        self._known = tuple(
            KnownKey(key, limits.get(key.name) or KeyLimits(self._clock)) for key in (*own, *self._file_keys)
        )

    def _find(self, request: Request) -> KnownKey | None:
        """The key that the request carries. Hashes are compared in constant time."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        sent = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not sent.strip():
            return None
        hashed = hash_of(sent.strip())  # a hash too: one that leaked opens nothing
        found = [each for each in self._known if hmac.compare_digest(each.key.key, hashed)]
        return found[0] if found else None

    def _keys_needed(self, admin: bool = False) -> bool:
        settings = self._settings
        return bool(settings.api_key or settings.keys_file or (admin and settings.admin_key))

    def _check_admin(self, key: Key | None) -> None:
        if key is not None and key.admin:
            return
        if not any(each.key.admin for each in self._known):
            raise RequestError(
                "this route needs an admin key and the service has none; start it with --admin-key, or mark a key "
                "of the keys file with admin: true",
                status=HTTPStatus.FORBIDDEN,
            )
        if key is not None:
            raise RequestError(
                f"this route needs an admin key, which {key.name!r} is not", status=HTTPStatus.FORBIDDEN
            )
        raise RequestError(
            "this route needs an admin key; send it as Authorization: Bearer KEY or as x-api-key",
            status=HTTPStatus.UNAUTHORIZED,
        )

    def _share(self) -> float:
        return 1.0 / max(1, self._num_ingresses())


def key_name(request: Request) -> str:
    """The name of the key that a request carries; "" if it carries none that is valid."""
    known = _known(request)
    return known.key.name if known else ""


def _known(request: Request) -> KnownKey | None:
    known: KnownKey | None = request.scope.get(_KEY)
    return known


def _signature(path: str) -> Signature:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
