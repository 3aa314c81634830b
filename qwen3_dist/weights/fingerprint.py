"""Tells checkpoints apart without reading all of their weights."""

from __future__ import annotations

import contextlib
from hashlib import blake2b
from pathlib import Path

from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.files import shard_files

_SIDECARS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
_SAMPLE_BYTES = 2**14


def fingerprint(path: Path, *settings: object) -> str:
    """Returns a digest of the checkpoint at `path`: of its small files, and of the size, start, middle and end of each
    file of weights, and of `settings`. Where the checkpoint lies makes no difference."""
    digest = blake2b(repr(settings).encode(), digest_size=16)
    more_templates = sorted(path.glob("additional_chat_templates/*.jinja"))
    for file in (*(path / name for name in _SIDECARS), *more_templates):
        if file.exists():
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    with contextlib.suppress(CheckpointError):  # only random weights do without
        digest.update(digest_of_weights(path).encode())
    return digest.hexdigest()


def digest_of_weights(path: Path) -> str:
    """Returns a digest of the weights at `path`: of the size, start, middle and end of each file. Raises
    CheckpointError or OSError if they cannot be read."""
    digest = blake2b(digest_size=16)
    for file in sorted(shard_files(path)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
