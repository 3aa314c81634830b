"""Serve's own command line deploys the application from a YAML file, with no code of ours around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.processes import with_environment
from tests.serve_app.support import free_port, wait_for

CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: qwen3
    import_path: serve_app.app:build_app
    args:
      model_name: from-yaml
      device: cpu
      num_blocks: 128
      engine: {{layout: "tp=2,ep=2", dtype: float32}}
"""


def written(file: Path, port: int) -> Path:
    file.write_text(CONFIG.format(port=port))
    return file


def built(file: Path, port: int) -> Path:
    """What `serve build` makes of the ready-made application, on another port."""
    build = [sys.executable, "-m", "ray.serve.scripts", "build", "serve_app.bundled:app", "-o", str(file)]
    subprocess.run(build, check=True, timeout=120)
    file.write_text(file.read_text().replace("port: 8000", f"port: {port}"))
    return file


@pytest.mark.parametrize(
    ("make", "model"), [(written, "from-yaml"), pytest.param(built, "qwen3-bundled", marks=pytest.mark.slow)]
)
def test_a_yaml_file_deploys_the_service(
    tmp_path: Path, make: Callable[[Path, int], Path], model: str
) -> None:
    port, mark = free_port(), uuid.uuid4().hex
    file = make(tmp_path / "service.yaml", port)
    request = {"model": model, "prompt": "hi", "max_tokens": 3, "ignore_eos": True}

    def answered() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=request, timeout=30)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3

    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(file)],
            stdout=output,
            stderr=output,
            env={**os.environ, "QWEN3_DIST_TEST": mark},
        )
    try:
        wait_for(answered)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    wait_for(lambda: not with_environment(f"QWEN3_DIST_TEST={mark}"))
