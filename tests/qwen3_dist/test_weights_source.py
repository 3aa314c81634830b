"""Finding checkpoints: what is asked of the hub."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from qwen3_dist.weights.source import resolve_config, resolve_model

FILES = ["config.json", "generation_config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]


@pytest.fixture
def downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that a stand-in for the hub was asked for."""
    names: list[str] = []

    def snapshot_download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        names.extend(name for name in FILES if any(fnmatch(name, pattern) for pattern in allow_patterns))
        (tmp_path / "config.json").write_text(json.dumps({"model": model}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return names


def test_a_hub_id_is_checked_by_its_configs_without_its_weights(
    downloaded: list[str], tmp_path: Path
) -> None:
    assert resolve_config("someone/large") == tmp_path
    assert downloaded == ["config.json", "generation_config.json"]


def test_a_hub_id_is_loaded_whole(downloaded: list[str], tmp_path: Path) -> None:
    assert resolve_model("someone/large") == tmp_path
    assert downloaded == FILES
