"""LoRA adapters and weights that are loaded by HTTP, and by `deploy`, while two replicas serve; and their sleep."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.weights.source import bundled_path
from serve_app.settings import BUNDLED_NAME, ServiceConfig
from tests.adapters import ATTENTION, write_adapter
from tests.serve_app.deployed_service import Deployed, deployed_beside
from tests.serve_app.support import error_of, wait_for
from tests.swapping import write_other_weights

NAME = "adapting"
TWO = {"min_replicas": 2, "max_replicas": 2}
LONG = {"prompt": list(range(5, 69)), "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def deployed(service_config: ServiceConfig, url: str) -> Iterator[Deployed]:
    with deployed_beside(service_config, url, NAME) as service:
        service.change(**TWO)
        yield service


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return {
        name: write_adapter(tmp_path / name, bundled_path(), ATTENTION, seed=seed, strength=0.3)
        for seed, name in enumerate(("one", "two"))
    }


def change(deployed: Deployed, verb: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{deployed.url}/v1/{verb}_lora_adapter", json=body, timeout=120)


def listed(deployed: Deployed) -> list[str]:
    return [model["id"] for model in httpx.get(f"{deployed.url}/v1/models", timeout=60).json()["data"]]


def of_replicas(deployed: Deployed) -> list[list[str]]:
    """The adapters of each replica that is healthy."""
    [model] = httpx.get(f"{deployed.url}/v1/cluster", timeout=60).json()["models"]
    return [replica["adapters"] for replica in model["replicas"] if replica["healthy"]]


def versions(deployed: Deployed) -> list[str | None]:
    """The version of each replica's weights."""
    [model] = httpx.get(f"{deployed.url}/v1/cluster", timeout=60).json()["models"]
    return [replica["weights"]["version"] for replica in model["replicas"]]


def all_have(deployed: Deployed, *adapters: str) -> bool:
    """Whether both replicas have these adapters, once they run."""
    return bool(wait_for(lambda: of_replicas(deployed) == [[*adapters]] * 2))


def texts(deployed: Deployed, model: str, times: int = 6) -> set[str]:
    """What requests for `model` that run at once, on both replicas, are answered."""
    with ThreadPoolExecutor(times) as pool:
        answers = [*pool.map(lambda _: deployed.ask(model=model, **LONG), range(times))]
    assert all(answer.is_success for answer in answers), [answer.text for answer in answers]
    return {answer.json()["choices"][0]["text"] for answer in answers}


def test_adapters_come_and_go_by_http(deployed: Deployed, paths: dict[str, Path], tmp_path: Path) -> None:
    wait_for(lambda: len(of_replicas(deployed)) == 2)
    engines = deployed.engines()
    plain = texts(deployed, BUNDLED_NAME)
    place = shutil.copytree(paths["one"], tmp_path / "place")
    told = change(deployed, "load", lora_name="poet", lora_path=str(place))
    assert told.is_success and told.text.startswith("Success"), told.text
    assert listed(deployed) == [BUNDLED_NAME, "poet"] and all_have(deployed, "poet")
    poet = texts(deployed, "poet")
    assert len(plain) == len(poet) == 1 and plain != poet

    for name, path in (("bad", tmp_path / "gone"), ("poet", paths["two"]), (BUNDLED_NAME, paths["two"])):
        assert error_of(change(deployed, "load", lora_name=name, lora_path=str(path)), 400)["message"]
    assert error_of(change(deployed, "load", lora_name="poet"), 400)["param"] == "lora_path"
    assert all_have(deployed, "poet") and texts(deployed, "poet") == poet

    # A stream goes on while another adapter is loaded.
    ask = {**LONG, "model": "poet", "stream": True, "max_tokens": 400}
    whole = deployed.ask(**{**ask, "stream": False}).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{deployed.url}/v1/completions", json=ask, timeout=120) as answer:
        lines = filter(None, answer.iter_lines())
        seen = [next(lines)]
        assert change(deployed, "load", lora_name="two", lora_path=str(paths["two"])).is_success
        seen += lines
    events = [json.loads(line.removeprefix("data: ")) for line in seen if "[DONE]" not in line]
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == whole
    two = texts(deployed, "two")
    assert two not in (plain, poet)

    # Other weights under the same name and path; no prefix of the old ones is used.
    shutil.copytree(paths["two"], place, dirs_exist_ok=True)
    assert texts(deployed, "poet") == poet
    assert change(deployed, "load", lora_name="poet", lora_path=str(place), load_inplace=True).is_success
    assert texts(deployed, "poet") == two

    # A replica that starts later has them too, and the weights of now, which are the same in another directory.
    same = shutil.copytree(bundled_path(), tmp_path / "same")
    told = httpx.post(f"{deployed.url}/v1/cluster/weights", json={"path": str(same)}, timeout=120)
    assert told.is_success and told.json()["version"] == "same", told.text
    actor = next(
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if each["name"].startswith(f"SERVE_REPLICA::{NAME}--")
    )
    assert engines == deployed.engines()
    ray.kill(ray.get_actor(actor, namespace="serve"))
    wait_for(lambda: deployed.engines() not in (engines, set()) and len(of_replicas(deployed)) == 2)
    assert all_have(deployed, "poet", "two") and versions(deployed) == ["same"] * 2
    assert texts(deployed, "poet") == two

    assert change(deployed, "unload", lora_name="poet", lora_int_id=1).is_success
    assert listed(deployed) == [BUNDLED_NAME, "two"] and all_have(deployed, "two")
    assert error_of(deployed.ask(model="poet"), 404)["param"] == "model"
    assert change(deployed, "unload", lora_name="poet").status_code == 404


def test_a_deploy_with_other_adapters_reloads_nothing(deployed: Deployed, paths: dict[str, Path]) -> None:
    wait_for(lambda: len(of_replicas(deployed)) == 2)
    engines = deployed.engines()
    deployed.change(**TWO, lora={"filed": str(paths["one"])})
    assert deployed.lines[1] == f"{NAME}--qwen3-bundled: takes its changed settings as it runs"
    wait_for(lambda: of_replicas(deployed) == [["filed"]] * 2 and listed(deployed) == [BUNDLED_NAME, "filed"])
    assert texts(deployed, "filed") != texts(deployed, BUNDLED_NAME)
    assert deployed.engines() == engines


@contextlib.contextmanager
def streaming(deployed: Deployed) -> Iterator[Iterator[str]]:
    """The lines of a long stream, whose first has come."""
    ask = {**LONG, "model": BUNDLED_NAME, "stream": True, "max_tokens": 600}
    with httpx.stream("POST", f"{deployed.url}/v1/completions", json=ask, timeout=120) as answer:
        lines = filter(None, answer.iter_lines())
        yield itertools.chain([next(lines)], lines)


def events_of(lines: Iterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if "[DONE]" not in line]


def test_weights_change_and_models_sleep_under_streams(deployed: Deployed, tmp_path: Path) -> None:
    deployed.change(**TWO)
    wait_for(lambda: versions(deployed) == [None, None] and len(of_replicas(deployed)) == 2)
    engines, other = deployed.engines(), write_other_weights(tmp_path / "other")
    with LLM(str(other), dtype="float32", use_tqdm=False) as llm:
        params = SamplingParams(max_tokens=LONG["max_tokens"], temperature=0, ignore_eos=True)
        [expected] = llm.generate(LONG["prompt"], params, use_tqdm=False)
    before = texts(deployed, BUNDLED_NAME)
    assert {expected.outputs[0].text} != before

    def post(route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{deployed.url}/v1/cluster/{route}", json=body, timeout=120)

    for body in ({"path": str(tmp_path / "gone")}, {"path": str(other), "version": "a b"}, {"path": ""}):
        assert error_of(post("weights", **body), 400)["param"] in ("path", "version")
    assert versions(deployed) == [None, None] and texts(deployed, BUNDLED_NAME) == before

    with streaming(deployed) as lines:
        told = post("weights", path=str(other), version="v7").json()
        assert (told["version"], told["replicas"]) == ("v7", 2) and told["bytes"] > 0 < told["seconds"], told
        events = events_of(lines)
    seen = [event.get("system_fingerprint") for event in events]
    assert seen[0] is None and seen[-1] == "v7" and events[-1]["choices"][0]["finish_reason"] == "length"
    assert versions(deployed) == ["v7", "v7"] and texts(deployed, BUNDLED_NAME) == {expected.outputs[0].text}
    page = httpx.get(f"{deployed.url}/metrics", timeout=60).text
    assert len(re.findall(r'qwen3_dist:weights_info{.*version="v7".*} 1', page)) == 2

    # A rank that takes the place of a lost one has them too.
    os.kill(min(engines), signal.SIGKILL)
    wait_for(lambda: deployed.engines() not in (engines, set()) and len(of_replicas(deployed)) == 2)
    assert len(deployed.engines() & engines) == 1
    assert texts(deployed, BUNDLED_NAME) == {expected.outputs[0].text}

    engines = deployed.engines()
    with streaming(deployed) as lines:
        assert post("sleep", level=2).json()["level"] == 2
        refused = deployed.ask(**LONG)
        assert "POST /v1/cluster/wake wakes it" in error_of(refused, 503)["message"]
        ready = httpx.get(f"{deployed.url}/ready", timeout=60)
        assert "is sleeping" in error_of(ready, 503)["message"]
        assert httpx.get(f"{deployed.url}/health", timeout=60).is_success
        assert post("wake").is_success
        assert events_of(lines)[-1]["choices"][0]["finish_reason"] == "length"
    assert texts(deployed, BUNDLED_NAME) == {expected.outputs[0].text}
    assert deployed.engines() == engines


def test_a_service_that_is_not_deployed_by_config_refuses(url: str, paths: dict[str, Path]) -> None:
    body = {"lora_name": "a", "lora_path": str(paths["one"])}
    told = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)
    assert "use `qwen3-dist deploy`" in error_of(told, 409)["message"]
    told = httpx.post(f"{url}/v1/cluster/weights", json={"path": str(paths["one"])}, timeout=60)
    assert "use `qwen3-dist deploy`" in error_of(told, 409)["message"]
