"""Serve's own command line deploys the application from a YAML file, with no code of ours around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import httpx

from tests.serve_app.support import free_port, wait_for, with_environment

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


def test_a_yaml_file_deploys_the_service(tmp_path: Path) -> None:
    port, mark = free_port(), uuid.uuid4().hex
    file = tmp_path / "service.yaml"
    file.write_text(CONFIG.format(port=port))
    request = {"model": "from-yaml", "prompt": "hi", "max_tokens": 3}

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
        wait_for(answered, timeout_s=120)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    wait_for(lambda: not with_environment(f"QWEN3_DIST_TEST={mark}"))
