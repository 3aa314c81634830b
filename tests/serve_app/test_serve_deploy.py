"""A service that is deployed beside the shared one, changed while it runs, and stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from cluster.ray_private import deployment_handle
from qwen3_dist.errors import ConfigError, QwenDistError, ResourceError
from serve_app.launch.deploy import stop
from serve_app.launch.status import application_states
from serve_app.settings import REPLICA, ServiceConfig
from tests.processes import processes_running
from tests.serve_app.command_line import qwen3_dist
from tests.serve_app.deployed_service import ASK, NAME, Deployed, deployed_beside
from tests.serve_app.support import error_of, wait_for


@pytest.fixture(scope="module")
def deployed(service_config: ServiceConfig, url: str) -> Iterator[Deployed]:
    with deployed_beside(service_config, url) as service:
        yield service


def test_a_changed_key_or_limit_reaches_the_service_and_reloads_no_engine(deployed: Deployed) -> None:
    engines = deployed.engines()
    assert len(engines) == 1 and deployed.ask().is_success

    deployed.change(api_key="new key")
    assert deployed.lines[:2] == [
        f"{NAME}: takes its changed settings as it runs",
        f"{NAME}--qwen3-bundled: stays as it is",
    ]
    wait_for(lambda: deployed.ask().status_code == 401)
    assert deployed.ask("new key").is_success and deployed.engines("new key") == engines

    deployed.change(max_request_mib=0.001)
    wait_for(lambda: deployed.ask(prompt="x" * 2000).status_code == 413)
    deployed.change(request_timeout_s=0.2)
    late = {"max_tokens": 1500, "ignore_eos": True}
    wait_for(lambda: deployed.ask(**late).status_code == 408)
    deployed.change(max_queued_tokens=1400)
    wait_for(deployed.is_full_of_prompts)
    deployed.change(max_ongoing_requests=1, max_queued_requests=1)
    wait_for(deployed.is_full_with_two_streams)
    assert deployed.engines() == engines


def test_a_request_that_waits_too_long_for_its_turn_is_refused_with_when_to_return(
    deployed: Deployed,
) -> None:
    large = {"max_tokens": 500, "ignore_eos": True}  # with its prompt, it leaves no blocks for another one

    def outcome(stream: bool, token: int) -> str:
        answer = deployed.ask(prompt=[token] * 1500, stream=stream, **large)
        if "the request waited 0.1 s for its turn" in answer.text:
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
            return "too late"
        assert answer.status_code == 200 or "already has 2 sequences" in answer.text  # the limit of before
        return "answered" if answer.is_success else "refused"

    deployed.change(queue_timeout_s=0.1)
    for stream in (True, False):
        seen: set[str] = set()
        while not seen >= {"answered", "too late"}:
            with ThreadPoolExecutor() as pool:
                seen |= set(pool.map(functools.partial(outcome, stream), (5, 6, 7)))
    page = httpx.get(f"{deployed.url}/metrics", timeout=60).text
    assert re.search(r'^qwen3_dist:http_refused_total\{[^}]*reason="overloaded"\} [1-9]', page, re.MULTILINE)
    deployed.change()
    assert deployed.ask().is_success


def test_admins_scale_a_model_by_http(deployed: Deployed) -> None:
    def admin(route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{deployed.url}/v1/cluster/{route}", json=body, timeout=60)

    deployed.change()
    engines = deployed.engines()
    told = admin("scale", min_replicas=2)
    assert told.json() == {
        "object": "cluster.scale",
        "model": "qwen3-bundled",
        "min_replicas": 2,
        "max_replicas": 2,
    }
    wait_for(lambda: len(deployed.engines()) == 2)
    assert engines < deployed.engines()
    assert admin("scale", min_replicas=1).is_success
    wait_for(lambda: len(deployed.engines()) == 1)

    assert "min_replicas" in error_of(admin("scale", min_replicas=-1), 400)["message"]
    assert admin("scale", model="other", min_replicas=1).status_code == 404
    assert (
        "max_replicas=1 must not be less"
        in error_of(admin("scale", min_replicas=2, max_replicas=1), 400)["message"]
    )


def test_streams_go_on_in_another_layout_by_an_admin_and_for_want_of_a_rank(deployed: Deployed) -> None:
    def scale(**body: Any) -> httpx.Response:
        return httpx.post(f"{deployed.url}/v1/cluster/scale", json=body, timeout=60)

    def replicas() -> list[dict[str, Any]]:
        view = httpx.get(f"{deployed.url}/v1/cluster", timeout=60).json()
        return list(view["models"][0]["replicas"])

    def layouts() -> list[str | None]:
        return [replica.get("layout") for replica in replicas()]

    def text_across(change: Callable[[], None]) -> str:
        """The text of a stream in the middle of which `change` is called."""
        with httpx.stream(
            "POST", f"{deployed.url}/v1/completions", json={**long, "stream": True}, timeout=180
        ) as answer:
            lines = filter(None, answer.iter_lines())
            begun = [next(lines)]
            change()
            events = [*begun, *lines]
        assert events.pop() == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    def change_layout() -> None:
        told = scale(layout="dp=2,ep=2").json()
        assert told == {"object": "cluster.scale", "model": "qwen3-bundled", "layout": "dp=2,ep=2"}

    def lose_a_rank_for_good() -> None:
        """Kills a rank, and whatever starts in its place."""
        known = {*processes_running("RankActor")}
        os.kill(replicas()[0]["ranks"][0]["pid"], signal.SIGKILL)
        while not replicas()[0].get("absence"):
            for pid in {*processes_running("RankActor")} - known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    deployed.change()
    long = {**ASK, "max_tokens": 900, "ignore_eos": True, "temperature": 0}
    expected = deployed.ask(**long).json()["choices"][0]["text"]
    for layout, message in (
        ("tp=3", "tp=3; tp=1, 2, 4, 8 work; layout=dp=3 is the nearest that fits"),
        ("ep=2", "ep=2 does not divide dp*tp=1; ep=1 work; layout=tp=2,ep=2 is the nearest that fits"),
        ("two", "where tp=N, dp=N, pp=N or ep=N"),
        ("dp=4000", "does not fit: 1 replica(s) of 4000 rank(s)"),
    ):
        assert message in error_of(scale(layout=layout), 400)["message"]
    assert "min_replicas is required" in error_of(scale(max_replicas=2), 400)["message"]
    assert layouts() == ["tp=1"]
    assert text_across(change_layout) == expected
    wait_for(lambda: layouts() == ["dp=2,ep=2"])
    assert text_across(lose_a_rank_for_good) == expected
    [replica] = replicas()
    assert replica["healthy"] and replica["layout"] == "tp=1" and len(replica["ranks"]) == 1
    assert replica["absence"]["configured"] == "dp=2,ep=2" and replica["absence"]["ranks"] == [0]
    assert replica["message"].startswith("runs without rank 0 of layout dp=2,ep=2: rank 0 died")
    [state] = [state for state in application_states() if state.name == f"{NAME}--qwen3-bundled"]
    assert f"{replica['id']} {replica['message']}" in state.message
    page = httpx.get(f"{deployed.url}/metrics", timeout=60).text
    for metric in (r"ranks_absent\{[^}]*\} 1\.0", r"rank_replacements_total\{[^}]*\} 0\.0"):
        assert re.search(f"^qwen3_dist:{metric}$", page, re.MULTILINE)
    deployed.change()
    wait_for(lambda: layouts() == ["tp=1"])


def test_a_reload_renews_each_replica_loses_no_request_and_outlasts_a_deploy(deployed: Deployed) -> None:
    def admin(**body: Any) -> httpx.Response:
        return httpx.post(f"{deployed.url}/v1/cluster/reload", json=body, timeout=60)

    def model() -> dict[str, Any]:
        view = httpx.get(f"{deployed.url}/v1/cluster", timeout=60).json()
        return dict(view["models"][0])

    long = {"max_tokens": 900, "ignore_eos": True, "temperature": 1.0}
    deployed.change(min_replicas=2, max_replicas=2)
    engines = wait_for(lambda: len(e := deployed.engines()) == 2 and e, timeout_s=90)
    expected = [deployed.ask(seed=seed, **long).json()["choices"][0]["text"] for seed in range(4)]
    texts: list[list[str]] = [[] for _ in expected]
    with contextlib.ExitStack() as streams, ThreadPoolExecutor() as pool:
        opened = []
        for seed in range(4):
            body = {**ASK, **long, "seed": seed, "stream": True}
            answer = streams.enter_context(
                httpx.stream("POST", f"{deployed.url}/v1/completions", json=body, timeout=180)
            )
            opened.append(answer.iter_lines())
            texts[seed].append(next(opened[-1]))
        unary = pool.submit(deployed.ask, seed=0, **long)
        told = admin()
        assert told.json()["object"] == "cluster.reload" and len(told.json()["replicas"]) == 2
        assert "are being reloaded" in error_of(admin(), 409)["message"]
        assert model()["reloading"] is True
        for text, lines in zip(texts, opened, strict=True):
            text.extend(lines)
        assert unary.result().json()["choices"][0]["text"] == expected[0]
    for text, whole in zip(texts, expected, strict=True):
        *events, done = [line.removeprefix("data: ") for line in text if line.startswith("data: ")]
        assert done == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole
    page = httpx.get(f"{deployed.url}/metrics", timeout=60).text  # streams were told to go on elsewhere
    assert re.search(r"^qwen3_dist:request_replica_losses_total\{[^}]*\} [1-9]", page, re.MULTILINE)
    wait_for(lambda: not model()["reloading"], timeout_s=120)
    renewed = wait_for(lambda: len(e := deployed.engines()) == 2 and e, timeout_s=90)
    assert not engines & renewed
    deployed.change(min_replicas=2, max_replicas=2)
    assert deployed.lines[1] == f"{NAME}--qwen3-bundled: stays as it is" and deployed.engines() == renewed
    assert error_of(admin(model="other"), 404)


def test_scaling_and_the_number_of_ingresses_change_without_a_reload(deployed: Deployed) -> None:
    deployed.change()
    engines = deployed.engines()
    deployed.change(min_replicas=2, max_replicas=2)
    wait_for(lambda: len(deployed.engines()) == 2)
    assert engines < deployed.engines()
    deployed.change(ingress_replicas=2)
    assert engines == deployed.engines() or wait_for(lambda: deployed.engines() == engines) is None


def test_another_model_comes_and_goes_and_the_first_notices_nothing(deployed: Deployed) -> None:
    deployed.change()
    wait_for(lambda: len(deployed.engines()) == 1)
    engines = deployed.engines()
    deployed.change(models=[{}, {"model_name": "second"}])
    assert f"{NAME}--second: starts" in deployed.lines
    listed = httpx.get(f"{deployed.url}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in listed] == ["qwen3-bundled", "second"]
    for name in ("qwen3-bundled", "second"):
        assert deployed.ask(model=name).json()["model"] == name
    assert "model is required" in error_of(deployed.ask(), 400)["message"]
    assert engines < deployed.engines()

    deployed.change()
    assert f"{NAME}--second: ends" in deployed.lines
    wait_for(lambda: deployed.engines() == engines)
    assert error_of(deployed.ask(model="second"), 404)


def test_an_ingress_may_hear_of_a_model_before_serve_does(deployed: Deployed) -> None:
    assert deployment_handle(REPLICA, f"{NAME}--not-yet-there") is not None


def test_a_changed_engine_is_loaded_again_and_the_command_says_why(deployed: Deployed) -> None:
    engines = deployed.engines()
    assert deployed.longest() == 2048
    with ThreadPoolExecutor() as pool:
        change = pool.submit(deployed.change, num_blocks=64, max_model_len=512, max_surge_percent=100)
        ready = set()  # the old engine ends only when the new one serves
        while not change.done():
            ready.add(httpx.get(f"{deployed.url}/ready", timeout=60).status_code)
        change.result()
    assert ready == {200}
    reloaded = f"{NAME}--qwen3-bundled: loads its model again, for a changed max_model_len, num_blocks"
    assert reloaded in deployed.lines
    assert deployed.longest() == 512
    assert not engines & deployed.engines()


def test_a_keys_file_that_no_node_can_use_is_refused_and_the_service_goes_on(
    deployed: Deployed, tmp_path: Path
) -> None:
    deployed.change()
    keys = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="no node can use the keys_file: .*keys.yaml cannot be read"):
        deployed.change(keys_file=str(keys))
    keys.write_text("keys:\n  - {name: a, kee: good}\n")
    with pytest.raises(ConfigError, match="keys.yaml:2: unknown setting 'keys.0.kee'"):
        deployed.change(keys_file=str(keys))
    assert deployed.lines == [] and deployed.ask().is_success


def test_a_gateway_that_failed_is_deployed_again_though_no_setting_changed(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.launch.deploy.check_keys_in_cluster", lambda config: None)
    deployed.change()
    engines = deployed.engines()
    keys = tmp_path / "keys.yaml"
    with pytest.raises(QwenDistError, match="keys.yaml"):
        deployed.change(keys_file=str(keys))
    keys.write_text("keys:\n  - {name: a, key: good}\n")
    deployed.change(keys_file=str(keys))
    assert deployed.lines[:2] == [
        f"{NAME}: has failed, so it ends and starts again",
        f"{NAME}--qwen3-bundled: stays as it is",
    ]
    assert deployed.ask("good").is_success and deployed.ask().status_code == 401
    assert deployed.engines("good") == engines
    deployed.change()
    assert deployed.lines[0] == f"{NAME}: takes its changed settings as it runs"


def test_a_deploy_while_a_lost_replica_is_replaced_waits_for_the_other_one(deployed: Deployed) -> None:
    deployed.change()
    [rank] = wait_for(lambda: len(e := deployed.engines()) == 1 and e)
    model = f"{NAME}--qwen3-bundled"
    [replica] = processes_running(f"ServeReplica:{model}:{REPLICA}")
    os.kill(replica, signal.SIGKILL)
    wait_for(lambda: serve.status().applications[model].status == "UNHEALTHY")
    deployed.change()
    assert f"{model}: stays as it is" in deployed.lines
    assert serve.status().applications[model].status == "RUNNING"
    assert deployed.ask().is_success and rank not in deployed.engines()


def test_a_stopped_service_is_gone_and_the_shared_one_answers(deployed: Deployed, url: str) -> None:
    stop(NAME, print, lambda: False, timeout_s=5)
    wait_for(lambda: deployed.ask().status_code == 404)
    assert httpx.get(f"{url}/ready", timeout=30).is_success
    with pytest.raises(ResourceError, match=f"no service called '{NAME}'"):
        stop(NAME, print, lambda: True)
    with pytest.raises(ResourceError, match=f"{NAME}--second is a model of the service {NAME}; remove it"):
        stop(f"{NAME}--second", print, lambda: True)


def test_the_commands_say_their_own_sentences_and_nothing_of_serve(
    service_config: ServiceConfig, url: str
) -> None:
    cluster = ("--ray-address", ray.get_runtime_context().gcs_address)
    where = ("--name", "quiet", "--route-prefix", "/quiet", "--port", str(service_config.endpoint.port))
    small = ("--device", "cpu", "--num-blocks", "64", "--cpus-per-rank", "0.05")
    commands = [
        qwen3_dist("deploy", *where, *small, *cluster),
        qwen3_dist("status", *cluster),
        qwen3_dist("stop", "--name", "quiet", *cluster),
    ]
    for command in commands:
        assert command.returncode == 0, command.stderr
        lines = [line for line in command.stderr.splitlines() if "network_util.cc" not in line]  # of C++ code
        assert all(line.startswith("qwen3-dist: ") for line in lines), command.stderr
    deployed, status, stopped = (command.stdout for command in commands)
    assert "is ready at" in deployed and "quiet--qwen3-bundled" in status and stopped == "quiet has ended\n"
