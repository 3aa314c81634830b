"""The real service's log files: a line for each request, one id from the header to the engine, changes as it runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from serve_app.launch.logs import ServiceLogs
from serve_app.settings import INGRESS, REPLICA, ServiceConfig
from serve_app.settings.options import model_options
from tests.serve_app.collector import running_collector
from tests.serve_app.command_line import qwen3_dist
from tests.serve_app.support import wait_for

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}


class Log:
    """The service's log, read as `qwen3-dist logs` does."""

    def __init__(self, name: str) -> None:
        self._logs = ServiceLogs(name)
        self._seen: list[str] = []

    def naming(self, request_id: str) -> list[str]:
        """The entries so far that name a request."""
        self._seen += [entry.text for entry in self._logs.new_entries()]
        return [text for text in self._seen if request_id in text]

    def wait_for(self, request_id: str, logger: str) -> list[str]:
        """Waits for entries of a logger that name a request."""
        found: list[str] = wait_for(lambda: [text for text in self.naming(request_id) if logger in text])
        return found


@pytest.fixture
def log(url: str, service_config: ServiceConfig) -> Log:
    return Log(service_config.endpoint.name)


def words(line: str) -> dict[str, str]:
    """The fields of a text line."""
    return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)


@pytest.mark.parametrize("stream", [False, True])
def test_a_requests_line_has_its_id_tokens_times_and_finish_reason(
    http: httpx.Client, model: str, log: Log, stream: bool
) -> None:
    asked = f"log-test-{stream}"
    answer = http.post(CHAT, json={**BODY, "stream": stream}, headers={"X-Request-Id": asked})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == [asked]
    assert f'"chatcmpl-{asked}"' in answer.text
    [line] = log.wait_for(asked, "qwen3_dist.access")
    told = words(line)
    assert (told["method"], told["path"], told["status"], told["model"]) == ("POST", CHAT, "200", model)
    assert (told["completion_tokens"], told["finish_reasons"]) == ("4", "length")
    assert int(told["prompt_tokens"]) > 0 and told["client_gone"] == "False"
    assert 0 < float(told["ttft_ms"]) <= float(told["e2e_ms"]) and float(told["queue_ms"]) >= 0
    assert told["replica"]


def test_refusals_have_a_line_and_an_id_too(http: httpx.Client, log: Log) -> None:
    answer = http.post(CHAT, json={"messages": []}, headers={"X-Request-Id": "refused 7"})
    assert answer.status_code == 400 and answer.headers["x-request-id"] == "refused 7"
    [line] = log.wait_for('"refused 7"', "qwen3_dist.access")
    assert "status=400" in line
    made = http.get("/v1/nothing").headers["x-request-id"]
    assert "status=404" in log.wait_for(made, "qwen3_dist.access")[0]


def test_a_client_that_leaves_has_a_line_with_its_tokens_until_then(
    http: httpx.Client, log: Log, model: str
) -> None:
    body = {**BODY, "stream": True, "max_tokens": 3500, "ignore_eos": True}
    with http.stream("POST", CHAT, json=body, headers={"X-Request-Id": "leaver"}) as answer:
        parts = (line for line in answer.iter_lines() if line.startswith("data:"))
        for _ in range(5):
            next(parts)
    [line] = log.wait_for("leaver", "qwen3_dist.access")
    told = words(line)
    assert (told["client_gone"], told["finish_reasons"], told["model"]) == ("True", "abort", model), line
    [early] = log.wait_for("leaver", "ended early")
    assert words(early)["finish_reasons"] == "abort"
    assert told["prompt_tokens"] == words(early)["prompt_tokens"] != "0"
    assert 3 <= int(told["completion_tokens"]) <= int(words(early)["completion_tokens"])


@pytest.fixture
def configure(url: str, service_config: ServiceConfig) -> Iterator[Callable[..., None]]:
    """Changes the settings of logs and traces as Serve does where a deployment's user_config changes."""
    ingress = serve.get_deployment_handle(INGRESS, service_config.endpoint.name)
    replica = serve.get_deployment_handle(REPLICA, service_config.application(service_config.models[0]))
    config = service_config.ingress_config().to_json()
    live = model_options(service_config, service_config.models[0])["user_config"]

    def change(**telemetry: Any) -> None:
        ingress.broadcast("reconfigure", {**config, "telemetry": telemetry}).results(timeout_s=30)
        replica.broadcast("reconfigure", {**live, "telemetry": telemetry}).results(timeout_s=30)

    yield change
    change()


def test_form_and_prompts_change_as_the_service_runs(
    http: httpx.Client, configure: Callable[..., None], log: Log
) -> None:
    http.post(CHAT, json=BODY, headers={"X-Request-Id": "unasked"})
    assert log.wait_for("unasked", "qwen3_dist.access")
    configure(log_format="json", log_requests=True)
    http.post(CHAT, json=BODY, headers={"X-Request-Id": "asked"})
    [access] = map(json.loads, log.wait_for('"asked"', "qwen3_dist.access"))
    assert (access["request_id"], access["status"], access["finish_reasons"]) == ("asked", 200, ["length"])
    [prompts] = map(json.loads, log.wait_for('"asked"', "qwen3_dist.requests"))
    assert "hi" in prompts["prompts"][0] and "max_tokens=4" in prompts["params"]
    configure(log_level="warning")
    http.post(CHAT, json=BODY, headers={"X-Request-Id": "quiet"})
    configure()
    http.post(CHAT, json=BODY, headers={"X-Request-Id": "loud"})
    assert log.wait_for("loud", "qwen3_dist.access")
    assert not log.naming("quiet")
    assert not any("qwen3_dist.requests" in line for line in log.naming("unasked"))


def test_ingress_and_replica_send_one_trace_to_a_collector(
    http: httpx.Client, configure: Callable[..., None], model: str
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running_collector() as collector:
        configure(otlp_traces_endpoint=collector.url)
        answer = http.post(CHAT, json=BODY, headers={"traceparent": f"00-{trace}-{parent}-01"})
        assert answer.is_success

        def found() -> dict[str, Any]:
            spans = {span.name: span for span, _ in collector.spans() if span.trace_id.hex() == trace}
            return spans if len(spans) == 5 else {}

        spans = wait_for(found)
        server = spans[f"POST {CHAT}"]
        [chat] = [span for name, span in spans.items() if name.startswith("chat ")]
        assert server.parent_span_id.hex() == parent
        assert chat.parent_span_id == server.span_id
        assert all(spans[name].parent_span_id == chat.span_id for name in ("queue", "prefill", "decode"))
        times = [server.start_time_unix_nano, chat.start_time_unix_nano]
        for name in ("queue", "prefill", "decode"):
            times += [spans[name].start_time_unix_nano, spans[name].end_time_unix_nano]
        assert times == sorted(times)
        told = {each.key: each.value for each in chat.attributes}
        assert told["gen_ai.operation.name"].string_value == "chat"
        assert told["gen_ai.request.model"].string_value == model
        assert (
            told["gen_ai.request.max_tokens"].int_value == told["gen_ai.usage.output_tokens"].int_value == 4
        )
        assert told["gen_ai.usage.input_tokens"].int_value == answer.json()["usage"]["prompt_tokens"]
        reasons = told["gen_ai.response.finish_reasons"].array_value.values
        assert [reason.string_value for reason in reasons] == ["length"]
        configure()


def our_lines(stderr: str) -> list[str]:
    """Lines of standard error but those of Ray's C++ code, which without a network warns before it can be told not
    to."""
    return [line for line in stderr.splitlines() if "network_util.cc" not in line]


def test_the_command_prints_a_requests_lines_follows_new_ones_and_names_a_missing_service(
    http: httpx.Client, service_config: ServiceConfig, log: Log
) -> None:
    cluster = ("--ray-address", ray.get_runtime_context().gcs_address)
    where = ("logs", "--name", service_config.endpoint.name, *cluster)
    http.post(CHAT, json=BODY, headers={"X-Request-Id": "told-1"})
    log.wait_for("told-1", "qwen3_dist.access")
    told = qwen3_dist(*where, "--request-id", "told-1")
    assert (told.returncode, our_lines(told.stderr)) == (0, [])
    [line] = told.stdout.splitlines()
    assert "qwen3_dist.access" in line and words(line)["request_id"] == "told-1"

    command = [sys.executable, "-m", "serve_app", *where, "--follow", "--request-id", "told-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == line + "\n"
        http.post(CHAT, json=BODY, headers={"X-Request-Id": "told-2"})
        assert words(following.stdout.readline())["request_id"] == "told-2"
        following.send_signal(signal.SIGINT)
        assert (following.stdout.read(), following.wait(timeout=60)) == ("", 0)

    nobody = qwen3_dist(*where, "--request-id", "never-asked")
    assert (nobody.returncode, nobody.stdout) == (0, "")
    assert our_lines(nobody.stderr) == ["qwen3-dist: no line names request never-asked"]
    missing = qwen3_dist("logs", "--name", "nothing", *cluster)
    assert missing.returncode == 2 and "a service called 'nothing'; those with logs: " in missing.stderr
