"""What the routes that load and unload adapters do where replicas, ingresses and Serve's controller are stand-ins: the
real ones are in `test_serve_adapters`."""

from __future__ import annotations

import asyncio
import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.settings_reader import read_settings
from serve_app.ingress import live_changes
from serve_app.ingress.adapter_changes import AdapterChanges
from serve_app.ingress.live_changes import LiveChanges
from serve_app.ingress.model_routes import ModelRoute
from serve_app.ingress.peers import Told
from serve_app.settings import LiveSettings


class Service:
    """Two replicas of the model `base`, one ingress, and what is deployed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replicas = ["one=/1", "one=/1"]  # the adapters of each
        self.problem = ""  # of the second one with `/bad`
        served = {"name": "base", "adapters": ["one"]}
        self.configs: dict[str, Any] = {
            "gateway": {"deployments": [{"name": "Ingress", "user_config": {"models": [served]}}]},
            "base": {"deployments": [{"name": "EngineReplica", "user_config": {"lora": "one=/1"}}]},
        }
        self.route = SimpleNamespace(
            model=SimpleNamespace(name="base", application="base", adapters=("one",), asleep=0, weights=""),
            replicas=self,
            require_awake=lambda: ModelRoute.require_awake(self.route),  # type: ignore[arg-type]
        )
        self.failures: list[Exception] = []  # of the next tries to give Serve a change
        self.peers = {"changing": False}
        self.meanwhile = lambda: None  # called as a replica takes up a change
        for name, value in {
            "running_replicas": lambda _: self.replicas,
            "broadcast": self.broadcast,
            "configs_of": lambda *_: copy.deepcopy(self.configs),
            "apply_configs": self.apply,
            "has_all": lambda _: True,
            "serve": SimpleNamespace(get_replica_context=lambda: SimpleNamespace(app_name="gateway")),
        }.items():
            monkeypatch.setattr(live_changes, name, value)
        self.changes = AdapterChanges(self, LiveChanges(self, self))  # type: ignore[arg-type]

    async def broadcast(self, _: Any, method: str, lora: str, again: Any, timeout_s: float) -> list[Any]:
        assert method == "use_adapters"
        self.replicas[0] = lora
        self.meanwhile()
        if "/bad" in lora:
            return ["", self.problem] if self.problem else ["", ConnectionError()]
        self.replicas[1] = lora
        return ["", ""]

    def apply(self, configs: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.configs = dict(zip(self.configs, configs, strict=True))
        [served] = self.configs["gateway"]["deployments"][0]["user_config"]["models"]
        self.route.model.adapters = tuple(served["adapters"])

    def __iter__(self) -> Any:
        return iter([self.route])

    def __contains__(self, name: str) -> bool:
        return name in ("base", *self.route.model.adapters)

    def find(self, name: str) -> Any:
        return self.route

    def offer(self, *_: Any) -> None:
        pass

    async def ask(self, name: str, timeout_s: float) -> list[Any]:
        return [Told("other", True)] if self.peers.get(name) else []

    @property
    def deployed(self) -> str:
        return str(self.configs["base"]["deployments"][0]["user_config"]["lora"])


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(monkeypatch)


def load(service: Service, **body: Any) -> str:
    return asyncio.run(service.changes.load(json.dumps(body).encode()))


def unload(service: Service, **body: Any) -> str:
    return asyncio.run(service.changes.unload(json.dumps(body).encode()))


def test_adapters_of_a_model_that_sleeps_do_not_wait_until_it_wakes(service: Service) -> None:
    service.route.model.asleep = 1
    for refused in (
        lambda: load(service, lora_name="two", lora_path="/2"),
        lambda: unload(service, lora_name="one"),
    ):
        with pytest.raises(RequestError, match="was put to sleep"):
            refused()
    assert service.replicas == ["one=/1"] * 2 and service.deployed == "one=/1"


def test_what_is_loaded_is_deployed_and_listed(service: Service) -> None:
    assert "'two'" in load(service, lora_name="two", lora_path="/2")
    assert service.replicas == ["one=/1,two=/2"] * 2 and service.deployed == "one=/1,two=/2"
    assert service.route.model.adapters == ("one", "two")
    load(service, lora_name="one", lora_path="/3", load_inplace=True)
    assert service.deployed == "one=/3,two=/2"
    assert "'one'" in unload(service, lora_name="one", lora_int_id=5)
    assert service.replicas == ["two=/2"] * 2 and service.deployed == "two=/2"


def test_what_is_deployed_meanwhile_stays(service: Service) -> None:
    live = service.configs["base"]["deployments"][0]["user_config"]
    service.meanwhile = lambda: live.update(max_queued_tokens=7)
    load(service, lora_name="two", lora_path="/2")
    assert service.configs["base"]["deployments"][0]["user_config"] == {
        "lora": "one=/1,two=/2", "max_queued_tokens": 7
    }  # fmt: skip


def test_a_model_that_is_undeployed_meanwhile_is_told_and_leaves_the_way_free(service: Service) -> None:
    models = service.configs["gateway"]["deployments"][0]["user_config"]["models"]
    kept = list(models)
    service.meanwhile = models.clear
    with pytest.raises(RequestError, match="'base' is no longer deployed"):
        load(service, lora_name="two", lora_path="/2")
    service.meanwhile = lambda: None
    models += kept
    assert "'two'" in load(service, lora_name="two", lora_path="/2")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "one", "lora_path": "/2"}, "lora_name"),
        ({"lora_name": "base", "lora_path": "/2"}, "lora_name"),
        ({"lora_name": "a b", "lora_path": "/2"}, "lora_name"),
        ({"lora_name": "two", "lora_path": ""}, "lora_name"),
        ({"lora_name": "two"}, "lora_path"),
        ({"lora_path": "/2"}, "lora_name"),
    ],
)
def test_a_load_that_makes_no_sense_asks_no_replica(
    service: Service, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as refused:
        load(service, **body)
    assert refused.value.status == 400 and refused.value.param == param
    assert service.replicas == ["one=/1"] * 2 and service.deployed == "one=/1"


@pytest.mark.parametrize("problem", ["no file", ""])
def test_if_one_replica_cannot_load_all_have_what_they_had(service: Service, problem: str) -> None:
    service.problem = problem
    with pytest.raises(RequestError if problem else EngineDeadError, match=problem or "was lost"):
        load(service, lora_name="two", lora_path="/bad")
    assert service.replicas == ["one=/1"] * 2 and service.deployed == "one=/1"
    load(service, lora_name="two", lora_path="/2")


def test_a_change_that_serve_does_not_take_leaves_all_with_what_they_had(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_changes, "_PAUSES_S", (0.0, 0.0))
    for failures in ([ValueError("no room")], [RayActorError(), GetTimeoutError(), RayActorError()]):
        service.failures = failures
        with pytest.raises(RequestError, match="Ray Serve did not take the change") as told:
            load(service, lora_name="two", lora_path="/2")
        assert told.value.status == 503 and not service.failures
        assert service.replicas == ["one=/1"] * 2 and service.deployed == "one=/1"
    service.failures = [RayActorError(), GetTimeoutError()]  # Ray starts another controller
    load(service, lora_name="two", lora_path="/2")
    assert service.replicas == ["one=/1,two=/2"] * 2 and service.deployed == "one=/1,two=/2"


def test_unknown_names_and_second_changes_are_refused(service: Service) -> None:
    with pytest.raises(RequestError) as unknown:
        unload(service, lora_name="two")
    assert unknown.value.status == 404
    service.peers["changing"] = True
    with pytest.raises(RequestError) as busy:
        unload(service, lora_name="one")
    assert busy.value.status == 409 and service.deployed == "one=/1"
    service.peers["changing"], service.replicas = False, []
    with pytest.raises(EngineDeadError, match="no replica"):
        load(service, lora_name="two", lora_path="/2")


def test_serve_keeps_the_adapters_as_text() -> None:
    live = LiveSettings(lora=LoraAdapters.parse("a=/1,b=/2"))
    assert live.to_json()["lora"] == "a=/1,b=/2"
    assert read_settings(LiveSettings, json.loads(json.dumps(live.to_json()))) == live
