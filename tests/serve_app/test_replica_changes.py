"""What a replica does if a rank is lost as it takes something up, with no engine."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from qwen3_dist.errors import EngineDeadError, ResourceError
from serve_app.replica.changes import ChangesAsItRuns


class Loses:
    """An engine that recovers from the loss of a rank, as often as it is lost."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = [*outcomes]
        self.recovered_times = 0

    async def recovered(self) -> None:
        self.recovered_times += 1

    async def sleep(self, level: int) -> None:
        if outcome := self._outcomes.pop(0):
            raise outcome


def changes(engine: Loses) -> ChangesAsItRuns:
    replica = ChangesAsItRuns()
    replica._engine = cast(Any, engine)
    return replica


def test_a_change_in_which_a_rank_is_lost_tells_of_a_lost_replica_not_of_a_bad_request() -> None:
    engine = Loses(EngineDeadError("rank 0 died"), None)
    with pytest.raises(EngineDeadError):
        asyncio.run(changes(engine).sleep(1))
    assert asyncio.run(changes(engine).sleep(1)) == "" and engine.recovered_times == 2
    assert asyncio.run(changes(Loses(ResourceError("no room"))).sleep(1)) == "no room"
