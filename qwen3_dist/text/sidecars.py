"""The small JSON files beside a checkpoint's weights: EOS ids, special tokens and generation defaults."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.sampling_params import SamplingParams

_log = logging.getLogger(__name__)
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Keys of generation_config.json that only transformers applies, with the values that have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
    """Returns the JSON object in `file`, {} if the file does not exist. Raises CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}); fetch the checkpoint again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must contain a JSON object, not a {type(value).__name__}")
    return value


def read_eos_token_ids(path: str | Path, tokenizer_eos: int | None = None) -> tuple[int, ...]:
    """Returns the EOS ids of generation_config.json, then `tokenizer_eos`, then those of config.json.

    All are needed, since fine-tunes often set the end of a turn in one place alone. Works without a tokenizer. Raises
    CheckpointError if a file is not JSON or an id is not a non-negative integer.
    """
    ids: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(Path(path) / name).get("eos_token_id")
        ids_of_file = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(
            isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids_of_file
        ):
            raise CheckpointError(
                f"eos_token_id of {Path(path) / name} must be a token id or a list of them, not {value!r}"
            )
        ids |= dict.fromkeys(ids_of_file)
        if tokenizer_eos is not None:
            ids.setdefault(tokenizer_eos)
    return tuple(ids)


def read_special_tokens(path: str | Path) -> dict[str, str]:
    """Returns the bos_token, eos_token, unk_token and pad_token that tokenizer_config.json sets, by these names. Those
    that it does not mention are read from special_tokens_map.json, as older transformers wrote it."""
    older = read_json_object(Path(path) / "special_tokens_map.json")
    config = older | read_json_object(Path(path) / "tokenizer_config.json")
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = (
            value.get("content") if isinstance(value, dict) else value
        )  # older files have an AddedToken object
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def read_generation_defaults(path: str | Path) -> dict[str, Any]:
    """Returns the arguments of SamplingParams that generation_config.json sets.

    As in vLLM, `do_sample` is ignored: a temperature in the file applies even with `do_sample` false. Logs a warning
    for settings that this service does not apply. Raises CheckpointError for a value that SamplingParams refuses.
    """
    file = Path(path) / "generation_config.json"
    config = read_json_object(file)
    defaults = {key: config[key] for key in _SAMPLING_KEYS if config.get(key) is not None}
    if config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = config["max_new_tokens"]
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise CheckpointError(f"{file} recommends an invalid value: {error}") from None
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key) is not None and config[key] not in neutral:
            _log.warning("%s recommends %s=%r, which is not applied", file, key, config[key])
    return defaults
