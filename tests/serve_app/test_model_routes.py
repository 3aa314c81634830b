"""What an ingress says of a model by what its replicas tell."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from serve_app.ingress.model_routes import ModelRoute
from serve_app.settings import ServedModel

MODEL = ServedModel("m", "", (), 1, 2, 4, 1.0, 30.0)


class Replicas:
    """A deployment's handle; `told` is what its replicas answer."""

    def __init__(self, *told: Any) -> None:
        self.told = told

    def broadcast(self, method: str) -> Replicas:
        assert method == "max_model_len"
        return self

    def results(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0 and return_exceptions
        return list(self.told)


def test_the_longest_sequence_is_what_every_replica_takes_now() -> None:
    replicas = Replicas(TimeoutError())
    unused = cast(Any, None)
    route = ModelRoute(MODEL, cast(Any, replicas), dispatcher=unused, health=unused)

    def longest(*told: Any) -> int | None:
        replicas.told = told
        return asyncio.run(route.longest())

    assert longest() is None
    assert longest(4096) == 4096
    assert longest(4096, 1024) == 1024  # a changed engine replaces another
    assert longest(TimeoutError(), 1024) == 1024
    assert longest(2048) == 2048
    assert longest(TimeoutError()) == longest() == 2048
