"""A stand-in for the hub on this machine: the requests that `huggingface_hub` makes for one model, and its faults."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL, COMMIT = "org/name", "a" * 40
_NOT_TO_DOWNLOAD = {"README.md": b"# A model", "original/consolidated.pth": bytes(1000)}


@dataclass
class Hub:
    """Serves the files of a checkpoint. `gets` counts the requests for each, `ranges` lists those that went on with a
    part. `refusal` is a status and the X-Error-Code of all answers; after `cut_after` bytes of the weights the
    connection ends, once, or waits for `go_on` if that is not None."""

    files: dict[str, bytes]
    url: str = ""
    gets: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    num_requests: int = 0
    refusal: tuple[int, str] | None = None
    tells_sizes: bool = True  # of files, when asked for a model's metadata
    stays_away: bool = False  # each connection ends without an answer
    goes_away: bool = False  # and stays away once it has cut one
    cut_after: int | None = None
    go_on: threading.Event | None = None

    def etag(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()


@contextlib.contextmanager
def serving(checkpoint: Path) -> Iterator[Hub]:
    hub = Hub({path.name: path.read_bytes() for path in checkpoint.iterdir()} | _NOT_TO_DOWNLOAD)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        if hub.go_on is not None:
            hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self._hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self._hub
        hub.num_requests += 1
        place = self.path.partition("?")[0]
        if hub.stays_away:
            self.close_connection = True
        elif "blobs=" in self.path and not hub.tells_sizes:
            self._send(b"", 500)
        elif hub.refusal is not None:
            self._send(b"", hub.refusal[0], {"X-Error-Code": hub.refusal[1]})
        elif place.startswith(f"/api/models/{MODEL}/tree/"):
            self._send(json.dumps([self._entry(name) for name in hub.files]).encode())
        elif place.startswith(f"/api/models/{MODEL}"):
            siblings = [{**self._entry(name), "rfilename": name} for name in hub.files]
            self._send(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode())
        elif place.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            self._send_file(place.removeprefix(f"/{MODEL}/resolve/{COMMIT}/"))
        else:
            self._send(b"", 404)

    def _entry(self, name: str) -> dict[str, object]:
        size, digest = len(self._hub.files[name]), self._hub.etag(name)
        lfs = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "size": size, "oid": digest, "blobId": digest, "lfs": lfs}

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _send_file(self, name: str) -> None:
        hub, headers = self._hub, {"ETag": f'"{self._hub.etag(name)}"', "X-Repo-Commit": COMMIT}
        data, begins, status = hub.files[name], self.headers.get("Range"), 200
        if begins is not None:
            hub.ranges.append(name)
            start = int(begins.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        if self.command == "GET":
            hub.gets[name] += 1
            if hub.cut_after is not None and name.endswith(".safetensors"):
                self._send_a_part(data, headers, hub.cut_after)
                return
        self._send(data, status, headers)

    def _send_a_part(self, data: bytes, headers: dict[str, str], size: int) -> None:
        self._hub.cut_after = None
        self._hub.stays_away = self._hub.goes_away
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:size])
        self.wfile.flush()
        if self._hub.go_on is not None:
            self._hub.go_on.wait()
        self.close_connection = True
        self.connection.close()
