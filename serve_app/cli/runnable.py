"""The model of a command that runs engines on it to measure them: with random weights where it has none."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def runnable(model: str, name: str, shared: Path | None = None) -> Iterator[tuple[Path, bool]]:
    """Yields the directory that engines load, and whether to use random weights since it has none.

    `model` is what the command line says and `name` what `find_config` makes of it. A config without weights is copied
    to a directory of its own, in `shared` if ranks on other hosts must find it. Raises CheckpointError.
    """
    from cluster.planning.official import official_configs
    from qwen3_dist.weights.source import local_path, resolve_model

    path = local_path(model)
    if name == "bundled" or (path.is_dir() and any(path.glob("*.safetensors"))):
        yield resolve_model("" if name == "bundled" else model), False
        return
    with tempfile.TemporaryDirectory(prefix="qwen3_dist-", dir=shared) as folder:
        target = Path(folder) / "config.json"
        if path.is_dir():
            shutil.copy(path / "config.json", target)
        elif path.is_file():
            shutil.copy(path, target)
        elif name in official_configs():
            target.write_text(json.dumps(official_configs()[name]))
        else:
            yield resolve_model(model), False
            return
        yield Path(folder).absolute(), True
