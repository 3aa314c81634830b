"""An HTTP proxy that notes what clients ask and what they are answered."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OF_THE_HOP = ("connection", "transfer-encoding", "content-length", "host", "accept-encoding", "keep-alive")
_TIMEOUT_S = 120


@dataclass
class Exchange:
    """One request and its answer; `body` is {} where the client sent none."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    status: int
    answer: bytes


@dataclass
class Recorder:
    """The base `url` that clients are given, and all `exchanges` in the order of their end."""

    url: str
    exchanges: list[Exchange] = field(default_factory=list)
    refusals_are_wanted: bool = False

    def generations(self) -> list[Exchange]:
        """Requests for answers, without lists of models and counts of tokens."""
        ends = ("/chat/completions", "/responses", "/messages")
        return [one for one in self.exchanges if one.path.partition("?")[0].endswith(ends)]


@contextlib.contextmanager
def recording(host: str, port: int) -> Iterator[Recorder]:
    """A context in which requests to the recorder's URL go to `host` and `port`."""
    recorder = Recorder("")

    class Handler(BaseHTTPRequestHandler):
        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            kept = {name: value for name, value in self.headers.items() if name.lower() not in _OF_THE_HOP}
            upstream = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
            upstream.request(self.command, self.path, body or None, kept)
            answer = upstream.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _OF_THE_HOP:
                    self.send_header(name, value)
            self.send_header("connection", "close")
            self.end_headers()
            heard = b""
            with contextlib.suppress(ConnectionError):  # a client that leaves
                while part := answer.read1():
                    heard += part
                    self.wfile.write(part)
            upstream.close()
            asked = json.loads(body) if body else {}
            recorder.exchanges.append(Exchange(self.path, kept, asked, answer.status, heard))

        do_GET = do_POST = do_DELETE = do_HEAD = _pass_on

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
