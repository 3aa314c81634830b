"""The small JSON files beside a checkpoint's weights: special tokens and generation defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_dist.errors import CheckpointError

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or {} where there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}); fetch the checkpoint again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_eos_token_ids(path: str | Path, tokenizer_eos: int | None = None) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json's, else `tokenizer_eos`, else config.json's, else none.

    Works without a tokenizer. Raises CheckpointError if a file is no JSON or its ids are no integers.
    """
    generation, config = Path(path) / "generation_config.json", Path(path) / "config.json"
    value = read_json_object(generation).get("eos_token_id")
    if value is None:
        value = tokenizer_eos
    if value is None:
        value = read_json_object(config).get("eos_token_id")
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise CheckpointError(f"eos_token_id in {path} must be an integer or a list of them, not {value!r}")
    return ids


def read_special_tokens(path: str | Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of tokenizer_config.json, as text; those it leaves unset are absent."""
    config = read_json_object(Path(path) / "tokenizer_config.json")
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value  # older files hold an AddedToken
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def read_generation_defaults(path: str | Path) -> dict[str, Any]:
    """The sampling parameters the checkpoint recommends; {} unless its `do_sample` is true."""
    config = read_json_object(Path(path) / "generation_config.json")
    if not config.get("do_sample"):
        return {}
    return {key: config[key] for key in _SAMPLING_KEYS if config.get(key) is not None}
