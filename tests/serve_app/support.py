"""What the serve tests share: settings of their service, waiting, and reading answers."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx

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
    "max_request_mib": 6,
}

_LONGEST_PAUSE_S = 0.5


def free_port() -> int:
    """One that nobody listens on and that no system hands out by itself: Ray's processes would take it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(what: Callable[[], Any], timeout_s: float = 120.0, pause_s: float = 0.05) -> Any:
    """The first true value of `what()`; fails after a generous time that only a fault exceeds.

    It asks less often the longer it waits, since each question costs the service CPU time that it needs.
    """
    began = time.monotonic()
    while not (value := what()):
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, f"waited {timeout_s:g} s in vain"
        time.sleep(max(pause_s, min(_LONGEST_PAUSE_S, waited_s / 10)))
    return value


def server_events(stream: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events, each of which is named by its type."""
    events = [event.partition(b"\ndata: ") for event in stream.split(b"\n\n") if event]
    data: list[dict[str, Any]] = [json.loads(value) for _, _, value in events]
    assert [name for name, _, _ in events] == [f"event: {value['type']}".encode() for value in data]
    return data


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """OpenAI's error object in `answer`."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error
