"""The small JSON files beside a checkpoint's weights: special tokens and generation defaults."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.sampling_params import SamplingParams

_log = logging.getLogger(__name__)
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What transformers would do with other keys of generation_config.json, by the values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "penalty_alpha": (),
    "stop_strings": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


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
    """Ids that end a generation: all of generation_config.json's, `tokenizer_eos` and config.json's, in this order.

    Fine-tunes often state the end of a turn in one of them alone. Works without a tokenizer. Raises CheckpointError
    if a file is no JSON or its ids are no integers.
    """
    ids: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(Path(path) / name).get("eos_token_id")
        stated = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stated):
            raise CheckpointError(
                f"eos_token_id of {Path(path) / name} must be a token id or a list of them, not {value!r}"
            )
        ids |= dict.fromkeys(stated)
        if tokenizer_eos is not None:
            ids.setdefault(tokenizer_eos)
    return tuple(ids)


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
    """The SamplingParams that the checkpoint recommends in generation_config.json, as far as it states them.

    As in vLLM `do_sample` is not read, so a file that states none or false and a temperature recommends that
    temperature. Logs what the file states and this service does not apply. Raises CheckpointError for a value that
    no request may have.
    """
    file = Path(path) / "generation_config.json"
    config = read_json_object(file)
    defaults = {key: config[key] for key in _SAMPLING_KEYS if config.get(key) is not None}
    if config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = config["max_new_tokens"]
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise CheckpointError(f"{file} recommends what no request may ask: {error}") from None
    for key, neutral in _NOT_APPLIED.items():
        if config.get(key) is not None and config[key] not in neutral:
            _log.warning("%s recommends %s=%r, which is not applied", file, key, config[key])
    return defaults
