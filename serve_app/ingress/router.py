"""How Ray Serve chooses the replica of a request: by what the ingress knows of them (`ReplicaTable`)."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve_app.apis.shared.generation import GenerationRequest
from serve_app.ingress.replica_table import table_of


class ReplicaRouter(RequestRouter):
    """Chooses among healthy replicas by their load and by the prompts that they have computed before.

    Ray Serve makes one for each handle of a model's deployment, whose options name this class.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which Serve tries them."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if no replica takes the request
        if len(candidate_replicas) < 2:
            return [candidate_replicas]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        table = table_of(self._deployment_id.app_name, self._deployment_id.name)
        return [[by_id[each]] for each in table.choose(list(by_id), _prompt(pending_request.args))]


def _prompt(arguments: list[Any]) -> bytes:
    request = arguments[0] if arguments else None
    return request.prompt_bytes() if isinstance(request, GenerationRequest) else b""
