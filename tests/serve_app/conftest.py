"""One real Ray with Serve for all serve tests: the bundled model and an adapter on two ranks, through HTTP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from ray import serve

from qwen3_dist.protocol.outputs import EngineStats
from qwen3_dist.weights.source import bundled_path
from serve_app.launch.foreground import running_service
from serve_app.settings import BUNDLED_NAME, REPLICA, ServiceConfig, read_service_config
from tests.adapters import ATTENTION, write_adapter
from tests.serve_app.support import SETTINGS, free_port
from tests.threads import engines_of_one_thread  # noqa: F401

ADAPTER = "sailor"
METRICS_PERIOD_S = 1  # in which Ray's processes send their metrics to its agent, by default each 10 s


@pytest.fixture(scope="session")
def service_config(tmp_path_factory: pytest.TempPathFactory) -> ServiceConfig:
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), bundled_path(), ATTENTION)
    return read_service_config({**SETTINGS, "lora": f"{ADAPTER}={adapter}", "port": free_port()})


@pytest.fixture(scope="session")
def url(service_config: ServiceConfig) -> Iterator[str]:
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("RAY_metrics_report_interval_ms", str(1000 * METRICS_PERIOD_S))
            service = running.enter_context(running_service(service_config))
        yield service.url


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
def stats(url: str, service_config: ServiceConfig) -> Callable[[], list[EngineStats]]:
    """Reads every replica's engine statistics. A new handle knows of no replica yet."""
    handle = serve.get_deployment_handle(REPLICA, service_config.application(service_config.models[0]))

    def read() -> list[EngineStats]:
        deadline = time.monotonic() + 30
        while not (readings := handle.broadcast("stats").results(timeout_s=30)):
            assert time.monotonic() < deadline, "no replica answers"
            time.sleep(0.05)
        return readings

    return read


@pytest.fixture
def idle(stats: Callable[[], list[EngineStats]]) -> Callable[[], bool]:
    """Whether no engine runs or holds anything."""
    return lambda: all(
        s.num_running + s.num_waiting == 0 and s.free_blocks == s.total_blocks for s in stats()
    )
