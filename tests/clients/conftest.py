"""A service of the bundled model whose answers are scripted, and the programs that `make clients` installed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve_app.app
from serve_app.launch.foreground import running_service
from serve_app.settings import read_service_config
from tests.clients.recorder import Recorder, recording
from tests.clients.scripted import ScriptedReplica, long_checkpoint
from tests.serve_app.support import free_port

INSTALLED = Path(__file__).parents[2] / ".venv" / "clients"
MODEL = "qwen3-bundled"
TIMEOUT_S = 240


@pytest.fixture(scope="session")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where the service listens."""
    model = long_checkpoint(tmp_path_factory.mktemp("models") / "long")
    port = free_port()
    settings = {"model": str(model), "model_name": MODEL, "port": port, "device": "cpu", "num_blocks": 8192}
    patch = pytest.MonkeyPatch()
    patch.setattr(serve_app.app, "EngineReplica", ScriptedReplica)
    try:
        with running_service(read_service_config(settings)):
            yield port
    finally:
        patch.undo()


@pytest.fixture
def recorder(port: int) -> Iterator[Recorder]:
    with recording("127.0.0.1", port) as recorder:
        yield recorder
        # Claude Code asks first whether anybody answers at /, and takes any answer.
        refused = [one for one in recorder.exchanges if one.status >= 400 and one.path != "/"]
        assert not refused or recorder.refusals_are_wanted, refused


class Machine:
    """A home and a working directory with secret.txt in it, in which clients run."""

    def __init__(self, home: Path) -> None:
        self.home, self.work = home, home / "work"
        self.work.mkdir()
        (self.work / "secret.txt").write_text("The word is pelican-4711.\n")

    def write(self, name: str, text: str) -> None:
        """A file of the home directory."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *command: str, cwd: Path | None = None, stdin: str = "", **variables: str) -> str:
        """What `command` prints. Fails with all that it said unless it ends well."""
        path = f"{INSTALLED / 'node_modules' / '.bin'}:{os.environ['PATH']}"
        env = {"HOME": str(self.home), "PATH": path, "LANG": "C.UTF-8", **variables}
        done = subprocess.run(
            command,
            cwd=cwd or self.work,
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("needs")
    assert marker is not None, "which package?"
    if not (INSTALLED / marker.args[0]).exists():
        pytest.skip(f"{marker.args[0]} is not installed; `make clients` does that")
