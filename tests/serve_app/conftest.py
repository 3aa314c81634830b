"""One real Ray with Serve for all serve tests: the bundled model on two ranks, through HTTP."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from qwen3_dist.engine.outputs import EngineStats
from serve_app.app import APP_NAME, REPLICA
from serve_app.config import BUNDLED_NAME, ServiceConfig, read_service_config
from serve_app.launch import running_service

# Short delays, so that scaling and replacement happen while a test waits. fp32, so that batching
# changes no greedy token.
SETTINGS: dict[str, Any] = {
    "layout": "tp=2,ep=2",
    "device": "cpu",
    "dtype": "float32",
    "num_blocks": 512,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 2,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1,
    "health_check_period_s": 0.5,
    "graceful_shutdown_timeout_s": 5,
    "max_request_mib": 1,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true value of `what()`; fails after a generous time that only a fault exceeds."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="session")
def service_config() -> ServiceConfig:
    return read_service_config({**SETTINGS, "port": free_port()})


@pytest.fixture(scope="session")
def url(service_config: ServiceConfig) -> Iterator[str]:
    with running_service(service_config) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def model() -> str:
    return BUNDLED_NAME


@pytest.fixture
def stats(url: str) -> Callable[[], list[EngineStats]]:
    """Reads every replica's engine statistics."""
    handle = serve.get_deployment_handle(REPLICA, APP_NAME)
    return lambda: handle.broadcast("stats").results(timeout_s=30)


@pytest.fixture
def idle(stats: Callable[[], list[EngineStats]]) -> Callable[[], bool]:
    """Whether no engine runs or holds anything."""
    return lambda: all(
        s.num_running + s.num_waiting == 0 and s.free_blocks == s.total_blocks for s in stats()
    )
