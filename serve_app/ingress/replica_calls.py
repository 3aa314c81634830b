"""Sends the requests for one model to its replicas, each to the best of those that Serve runs.

Serve starts, checks, scales and ends replicas. Requests themselves do not pass through it: that would cost several
milliseconds of CPU time each.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from contextvars import Context
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.ray_private import count_request, running_replicas
from qwen3_dist.errors import EngineDeadError
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.ingress.replica_table import ReplicaTable
from serve_app.ingress.request_client import Call, Connection, RequestClient
from serve_app.replica_status import ReplicaStatus

_GONE = "the replica that was to run this request is gone; send it again"


class ReplicaCalls:
    """Sends requests to the replicas of `handle`, which `table` chooses among. `poll` has replicas be asked for their
    status soon.

    While none is known to run, Serve is asked for one, for which it starts a replica if it has scaled to zero.
    """

    def __init__(self, handle: DeploymentHandle, table: ReplicaTable) -> None:
        self.poll: Callable[[], None] = lambda: None
        self._handle, self._table = handle, table
        self._client = RequestClient()
        self._unknown: frozenset[str] = frozenset()  # running replicas whose address is not known

    def send(self, request: Any, *arguments: Any, **options: Any) -> Call:
        """Has a replica answer a request; the arguments are those of `EngineReplica.answer`."""
        payload = pickle.dumps(((request, *arguments), options), pickle.HIGHEST_PROTOCOL)
        replica = self._choose(request)
        connection = self._client.connection(self._table.addresses[replica]) if replica else None
        if connection is None:
            return self._call_later(replica, payload)
        call = Call()
        self._start(call, replica, connection, payload)
        return call

    def _choose(self, request: Any) -> str:
        """The replica for a request; "" if none is known."""
        running = running_replicas(self._handle)
        known = [each for each in running if each in self._table.addresses]
        unknown = frozenset(running).difference(known)
        if unknown - self._unknown:
            self.poll()
        self._unknown = unknown
        if len(known) < 2:
            return known[0] if known else ""
        prompt = request.prompt_bytes() if isinstance(request, GenerationRequest) else b""
        return self._table.choose(known, prompt)

    def _call_later(self, replica: str, payload: bytes) -> Call:
        async def open_call() -> None:
            chosen = replica or await self._ask_serve()
            address = self._table.addresses.get(chosen)
            try:
                if address is None:
                    raise EngineDeadError(_GONE)
                connection = await self._client.connect(address)
            except EngineDeadError:
                self._table.forget(chosen)
                raise
            self._start(call, chosen, connection, payload)

        # Outside of the context of the client's request, with which Serve would cancel its own calls.
        call = Call(asyncio.create_task(open_call(), context=Context()))
        return call

    async def _ask_serve(self) -> str:
        """A replica that runs, once there is one. Raises EngineDeadError if it is lost before it tells so."""
        try:
            status: ReplicaStatus = await self._handle.status.remote()
        except (RayActorError, DeploymentUnavailableError):
            raise EngineDeadError(_GONE) from None
        self._table.learn(status)
        return status.replica

    def _start(self, call: Call, replica: str, connection: Connection, payload: bytes) -> None:
        call.start(connection, payload, count_request(self._handle, replica))
