"""A service beside others of a Ray cluster: where it has no place, and when it has lost its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from qwen3_dist.errors import ConfigError, QwenDistError, ResourceError
from serve_app.cli.serve import StopSignals
from serve_app.launch import foreground as launch
from serve_app.launch import serve_instance
from serve_app.launch.foreground import RunningService
from serve_app.launch.serve_instance import (
    RunningApplication,
    ServeInstance,
    check_no_conflict,
    is_running,
)
from serve_app.launch.shutdown import end_unused_serve
from serve_app.settings import ServiceConfig, read_service_config

FIRST = RunningApplication("qwen3_dist", "/", 100.0)


def instance(*applications: RunningApplication) -> ServeInstance:
    return ServeInstance("127.0.0.1", 8000, {found.name: found for found in applications})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "'qwen3_dist'; choose another --name"),
        ({"route_prefix": "/second"}, "'qwen3_dist'; choose another --name"),
        ({"name": "second"}, "already uses the route prefix /; choose another --route-prefix"),
        ({"name": "second", "route_prefix": "/second", "port": 8001}, "--host 127.0.0.1 --port 8000"),
        ({"name": "second", "route_prefix": "/second", "host": "0.0.0.0"}, "--host 127.0.0.1 --port 8000"),
    ],
)
def test_a_second_service_that_would_touch_the_first_is_refused(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(QwenDistError, match=words) as refused:
        check_no_conflict(read_service_config(settings), instance(FIRST))
    assert "\n" not in str(refused.value)


def test_a_service_with_another_certificate_than_serves_is_refused() -> None:
    tls = {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem"}
    second = {"name": "second", "route_prefix": "/second"}
    with pytest.raises(ConfigError, match="speaks HTTP without TLS"):
        check_no_conflict(read_service_config({**second, **tls}), instance(FIRST))
    secure = ServeInstance("127.0.0.1", 8000, {FIRST.name: FIRST}, "cert.pem")
    with pytest.raises(ConfigError, match="uses the certificate cert.pem"):
        check_no_conflict(read_service_config(second), secure)
    check_no_conflict(read_service_config({**second, **tls}), secure)


def test_a_second_service_with_a_name_and_a_prefix_of_its_own_has_a_place() -> None:
    second = {"name": "second", "route_prefix": "/second", "host": "localhost"}
    check_no_conflict(read_service_config(second), instance(FIRST))
    check_no_conflict(ServiceConfig(), instance())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("name", "a#b"),
        ("route_prefix", "small"),
        ("route_prefix", "/small/"),
        ("route_prefix", ""),
    ],
)
def test_a_name_or_prefix_that_serve_could_not_use_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_service_config({name: value})


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (None, "no longer exists in Ray Serve"),
        (instance(), "no longer exists in Ray Serve"),
        (instance(RunningApplication("qwen3_dist", "/", 200.0)), "was replaced by another deployment"),
    ],
)
def test_a_service_whose_application_is_gone_or_replaced_ends_with_an_error_and_deletes_nothing(
    monkeypatch: pytest.MonkeyPatch, later: ServeInstance | None, words: str
) -> None:
    states = [instance(FIRST), RayError("the controller restarts"), instance(FIRST), later]

    def running_serve() -> ServeInstance | None:
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, RayError):
            raise state
        return state

    monkeypatch.setattr(serve_instance, "running_serve", running_serve)
    monkeypatch.setattr(launch, "_WATCH_S", 0.0)
    with pytest.raises(ResourceError, match=words):
        RunningService("http://127.0.0.1:8000", [FIRST]).watch()
    assert states == [later]
    assert not is_running(FIRST)


@pytest.mark.parametrize(
    ("statuses", "ends"),
    [((), True), (("DELETING",), True), (("DELETING", "RUNNING"), False), (("DEPLOYING",), False)],
)
def test_serve_ends_with_the_service_that_started_it_unless_others_run_in_it(
    monkeypatch: pytest.MonkeyPatch, statuses: tuple[str, ...], ends: bool
) -> None:
    found = {status: SimpleNamespace(status=ApplicationStatus(status)) for status in statuses}
    ended: list[bool] = []
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=found))
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append(True))
    end_unused_serve()
    assert ended == [True] * ends


def test_a_serve_that_never_answers_again_is_told_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def running_serve() -> None:
        raise RayError("no controller")

    monkeypatch.setattr(serve_instance, "running_serve", running_serve)
    monkeypatch.setattr(launch, "_WATCH_S", 0.0)
    monkeypatch.setattr(launch, "_SERVE_LOST_S", 0.0)
    with pytest.raises(ResourceError, match="has not answered"):
        RunningService("http://127.0.0.1:8000", [FIRST]).watch()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Gives back the handlers of signals that a test changes."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_the_first_signal_ends_in_order_the_second_hurries_and_the_third_ends_the_process(
    handlers: None, monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(numbers[0])
    assert not signals.stop_now()
    signal.raise_signal(numbers[1])
    assert signals.stop_now() and not codes
    signal.raise_signal(numbers[0])
    assert codes == [1]


def test_a_background_job_of_a_script_goes_on_ignoring_ctrl_c(handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopSignals()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
