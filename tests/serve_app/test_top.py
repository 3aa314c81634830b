"""`qwen3-dist top` beside a service that loses a replica, restarts, or wants a key."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve_app.cli import main
from tests.serve_app.command_line import refusal

VIEW = {
    "uptime_s": 5,
    "ingress": {"in_flight": 0, "limit": 8},
    "models": [
        {
            "id": "m",
            "status": "unhealthy",
            "replicas_running": 0,
            "min_replicas": 1,
            "max_replicas": 1,
            "waits_for": "{'GPU': 8.0}",
            "replicas": [{"id": None, "healthy": False, "message": "rank 1 died\nof many\nlines"}],
        }
    ],
}
LOST: tuple[int, Any] = (503, {"error": {"message": "a replica was lost"}})


class Service:
    """Answers /v1/cluster with each of `views` in turn, then with the last, and /v1/cluster/experts as a service does
    that lost a replica. `keys` are those that it was sent."""

    def __init__(self, *views: tuple[int, Any]) -> None:
        self.keys: list[str | None] = []
        left = list(views)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805 - the service is `self`
                self.keys.append(handler.headers["authorization"])
                status, body = LOST
                if not handler.path.endswith("experts"):
                    status, body = left.pop(0) if len(left) > 1 else left[0]
                handler.send_response(status)
                handler.end_headers()
                handler.wfile.write(json.dumps(body).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


class Watcher(io.StringIO):
    """A user who presses Ctrl-C once `views` views were shown."""

    def __init__(self, views: int) -> None:
        super().__init__()
        self.left = views

    def write(self, text: str) -> int:
        written = super().write(text)
        self.left -= "sequences in flight" in text
        if not self.left:
            raise KeyboardInterrupt
        return written


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    found = Service(*request.param)
    serving = threading.Thread(target=found.server.serve_forever)
    serving.start()
    yield found
    found.server.shutdown()
    serving.join()
    found.server.server_close()


@pytest.mark.parametrize("service", [[(200, VIEW)]], indirect=True)
def test_a_lost_replica_is_shown_and_ends_no_view(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", service.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "m: unhealthy, 0 of 1 to 1 replicas\n  a replica waits for room for {'GPU': 8.0}\n" in shown
    assert "rank 1 died\nbusiest" in shown
    assert "busiest experts: unknown, since not all replicas answer" in shown


@pytest.mark.parametrize("service", [[(200, VIEW), LOST, (200, VIEW)]], indirect=True)
def test_top_goes_on_once_the_service_answers_again(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Watcher(views=2)
    monkeypatch.setattr("sys.stdout", out)
    assert main(["top", service.url, "--interval", "0.01"]) == 0
    assert out.getvalue().count("sequences in flight") == 2
    assert "answers 503 for /v1/cluster; a replica was lost" in capsys.readouterr().err


@pytest.mark.parametrize("service", [[LOST]], indirect=True)
def test_a_service_that_never_answered_ends_top(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a replica was lost" in refusal(capsys, "top", service.url)


@pytest.mark.parametrize("service", [[(401, {})]], indirect=True)
def test_a_missing_key_is_named_with_its_variable(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of openai")
    monkeypatch.setenv("QWEN3_DIST_API_KEY", "mine")
    assert "give --api-key, or QWEN3_DIST_API_KEY in the environment" in refusal(
        capsys, "top", service.url, "--once"
    )
    refusal(capsys, "top", service.url, "--once", "--api-key", "given")
    monkeypatch.delenv("QWEN3_DIST_API_KEY")
    refusal(capsys, "top", service.url, "--once")
    assert service.keys == ["Bearer mine", "Bearer given", "Bearer of openai"]
