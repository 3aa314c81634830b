"""Which version of the weights an answer comes from, and what the routes that change them do where replicas, ingresses
and Serve's controller are stand-ins. The real ones are in `test_serve_adapters`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import ConfigError, EngineDeadError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from qwen3_dist.weights_version import WeightsVersion
from serve_app.apis.shared.answer import Counted, Running
from serve_app.ingress import live_changes
from serve_app.ingress.live_changes import LiveChanges
from serve_app.ingress.progress import Progress
from serve_app.ingress.weight_changes import WeightChanges
from serve_app.settings import LiveSettings
from tests.serve_app.resuming import answered, asked, replica_of
from tests.swapping import write_other_weights


def test_an_answer_goes_on_where_the_weights_are_those_of_its_last_part(tmp_path: Path) -> None:
    other = WeightsVersion(str(write_other_weights(tmp_path / "other")), "v2")
    request = asked("completions", max_tokens=600, ignore_eos=True)

    async def begin(engine: AsyncEngine) -> list[Any]:
        """The parts of a stream whose weights change after its first tokens."""
        items = replica_of(engine).answer(request, "request-7")
        begun = [item async for item in _first(items, 4)]
        await engine.use_weights(other)
        return begun + [item async for item in items]

    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    try:
        parts = [part for part in asyncio.run(begin(engine)) if isinstance(part, Counted)]
        models = [part.model for part in parts]
        assert models[0] != models[-1] and len({*models}) == 2
        versions = [_version(part) for part in parts[1:-1]]
        assert versions[0] is None and versions[-1] == "v2"
        changed_at = models.index(models[-1])
        whole = b"".join(bytes(part.item) for part in parts[1:])
        for cut, status in ((changed_at, 409), (changed_at + 5, 200)):
            progress = Progress()
            for part in parts[:cut]:
                progress.count(part)
            first, *rest = answered(replica_of(engine), request, progress.resume)
            if status == 409:
                assert first[0] == 409 and "the model was changed" in json.loads(first[1])["error"]["message"]
            else:
                seen = b"".join(bytes(part.item) for part in parts[1:cut])
                assert first.item == (200, b"")
                assert seen + b"".join(bytes(part.item) for part in rest) == whole
    finally:
        engine.shutdown()


async def _first(items: Any, count: int) -> Any:
    for _ in range(count):
        item = await anext(items)
        if not isinstance(item, Running):
            yield item


def _version(part: Counted) -> str | None:
    event = bytes(part.item).partition(b"\n\n")[0].removeprefix(b"data: ")
    version: str | None = json.loads(event).get("system_fingerprint")
    return version


class Service:
    """Two replicas of the model `base`, one ingress, and what is deployed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replicas: list[Any] = [["", 0], ["", 0]]  # the weights and the level of sleep of each
        served = {"name": "base", "adapters": []}
        self.live: dict[str, Any] = {"lora": ""}
        self.configs: dict[str, Any] = {
            "gateway": {"deployments": [{"name": "Ingress", "user_config": {"models": [served]}}]},
            "base": {"deployments": [{"name": "EngineReplica", "user_config": self.live}]},
        }
        self.route = SimpleNamespace(
            model=SimpleNamespace(name="base", application="base", adapters=(), asleep=0, weights=""),
            replicas=self,
        )
        for name, value in {
            "running_replicas": lambda _: self.replicas,
            "broadcast": self.broadcast,
            "configs_of": lambda *_: self.configs,
            "apply_configs": lambda _: self.route.model.__dict__.update(
                asleep=served.get("asleep", 0), weights=served.get("weights", "")
            ),
            "has_all": lambda _: True,
            "serve": SimpleNamespace(get_replica_context=lambda: SimpleNamespace(app_name="gateway")),
        }.items():
            monkeypatch.setattr(live_changes, name, value)
        self.changes = WeightChanges(self, LiveChanges(self, self))  # type: ignore[arg-type]

    async def broadcast(self, _: Any, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        place = {"use_weights": 0, "sleep": 1}[method]
        for number, replica in enumerate(self.replicas):
            if number == 0 or arguments[0] != "bad=/bad":
                replica[place] = arguments[0]
        if method == "sleep":
            return ["", ""]
        second: Any = {"seconds": 2.0, "bytes": 7}
        return [{"seconds": 1.0, "bytes": 5}, "does not fit" if arguments[0] == "bad=/bad" else second]

    def __iter__(self) -> Any:
        return iter([self.route])

    def find(self, name: str) -> Any:
        return self.route

    def offer(self, *_: Any) -> None:
        pass

    async def ask(self, name: str, timeout_s: float) -> list[Any]:
        return []


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(monkeypatch)


def post(service: Service, verb: str, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = asyncio.run(getattr(service.changes, verb)(json.dumps(body).encode()))
    return answer


def test_weights_that_all_replicas_have_are_deployed(service: Service) -> None:
    told = post(service, "load", path="/weights/step-1")
    assert told == {
        "object": "cluster.weights",
        "model": "base",
        "version": "step-1",
        "path": "/weights/step-1",
        "replicas": 2,
        "seconds": 2.0,
        "bytes": 12,
    }
    assert service.live["weights"] == "step-1=/weights/step-1"
    with pytest.raises(RequestError, match="does not fit") as refused:
        post(service, "load", path="/bad")
    assert refused.value.param == "path"
    assert [replica[0] for replica in service.replicas] == ["step-1=/weights/step-1"] * 2
    assert service.live["weights"] == "step-1=/weights/step-1"
    service.replicas = []
    with pytest.raises(EngineDeadError, match="no replica"):
        post(service, "load", path="/weights/step-2")


def test_sleep_is_deployed_and_listed_until_the_model_wakes(service: Service) -> None:
    assert post(service, "sleep", level=2) == {"object": "cluster.sleep", "model": "base", "level": 2}
    assert (service.live["asleep"], service.route.model.asleep) == (2, 2)
    with pytest.raises(RequestError, match="level"):
        post(service, "sleep", level=3)
    assert post(service, "wake") == {"object": "cluster.wake", "model": "base"}
    assert (service.live["asleep"], service.route.model.asleep) == (0, 0)
    assert [replica[1] for replica in service.replicas] == [0, 0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", WeightsVersion()),
        ("/a/step-1", WeightsVersion("/a/step-1", "step-1")),
        ("v=/a/b=c", WeightsVersion("/a/b=c", "v")),
        ({"v": "/a"}, WeightsVersion("/a", "v")),
    ],
)
def test_weights_are_kept_as_text(given: Any, expected: WeightsVersion) -> None:
    live = LiveSettings(weights=WeightsVersion.parse(given))
    assert live.weights == expected
    assert read_settings(LiveSettings, json.loads(json.dumps(live.to_json()))) == live


@pytest.mark.parametrize("given", ["a b=/x", "v=", 3, {"a": "/1", "b": "/2"}])
def test_weights_that_make_no_sense_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="weights"):
        WeightsVersion.parse(given)
