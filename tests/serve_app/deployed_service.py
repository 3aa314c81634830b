"""A service that tests deploy beside the shared one, as a client and an operator see it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from qwen3_dist.errors import ResourceError
from serve_app.launch.deploy import deploy, stop
from serve_app.settings import ServiceConfig, read_service_config
from tests.serve_app.support import SETTINGS

NAME = "deployed"
MODEL = {
    **SETTINGS,
    "model": "",
    "layout": "tp=1",
    "cpus_per_rank": 0.05,
    "ranks_per_host": 2,
    "num_blocks": 128,
    "min_replicas": 1,
    "max_replicas": 1,
}
ASK = {"prompt": "hi", "max_tokens": 2}


class Deployed:
    """The service as a client and an operator see it; `change` deploys it with other settings."""

    def __init__(self, shared: ServiceConfig, url: str, name: str = NAME) -> None:
        self._endpoint = {"name": name, "route_prefix": f"/{name}", "port": shared.endpoint.port}
        self.url = f"{url}/{name}"
        self.lines: list[str] = []

    def change(self, **settings: Any) -> None:
        self.lines = []
        deploy(read_service_config({**MODEL, **self._endpoint, **settings}), self.lines.append)

    def ask(self, key: str = "", **fields: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{self.url}/v1/completions", json={**ASK, **fields}, headers=headers, timeout=60)

    def is_full_with_two_streams(self) -> bool:
        """Whether a request beside two running ones is refused."""
        endless = {**ASK, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with contextlib.ExitStack() as streams:
            lines = []  # a dropped iterator would hang up
            for _ in range(2):
                answer = streams.enter_context(
                    httpx.stream("POST", f"{self.url}/v1/completions", json=endless, timeout=60)
                )
                lines.append(answer.iter_lines())
                next(lines[-1])
            return self.ask().status_code == 429

    def is_full_of_prompts(self) -> bool:
        """Whether a short request is refused while a long prompt waits for the blocks that another one holds."""

        def insist(token: int) -> httpx.Response:
            large = {"prompt": [token] * 1500, "max_tokens": 500, "ignore_eos": True}
            while (answer := self.ask(**large)).status_code == 429:
                pass
            return answer

        with ThreadPoolExecutor() as pool:
            others = [pool.submit(insist, token) for token in (5, 6)]
            while not all(other.done() for other in others):
                refused = self.ask()
                found = re.search(r"about (\d+) tokens of other requests wait already", refused.text)
                if found and int(found[1]) >= 1500:  # told by the engine
                    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
                    return True
        return False

    def longest(self) -> int:
        """What /v1/models tells of the only model."""
        [model] = httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]
        return int(model["max_model_len"])

    def engines(self, key: str = "") -> set[int]:
        """The processes of all ranks, by which a reload shows."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{self.url}/v1/cluster/ranks", headers=headers, timeout=60)
        replicas = answer.json()["data"] if answer.is_success else []  # 503 while one of them goes
        return {rank["pid"] for replica in replicas for rank in replica["ranks"]}


@contextlib.contextmanager
def deployed_beside(shared: ServiceConfig, url: str, name: str = NAME, **settings: Any) -> Iterator[Deployed]:
    """A context in which a service called `name` runs beside the shared one, which answers at `url`."""
    service = Deployed(shared, url, name)
    service.change(**settings)
    try:
        yield service
    finally:
        with contextlib.suppress(ResourceError):
            stop(name, print, lambda: True)
