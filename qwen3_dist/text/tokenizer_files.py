"""Reads a checkpoint's tokenizer from tokenizer.json, or from the vocab.json and merges.txt of older checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen3_dist.errors import CheckpointError
from qwen3_dist.text.sidecars import read_json_object, read_special_tokens

# How Qwen's tokenizers split a text into words; the older files do not have it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OLDER = ("vocab.json", "merges.txt")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def has_tokenizer(path: Path) -> bool:
    """Whether the checkpoint at `path` has a file of a tokenizer."""
    return any((path / name).exists() for name in ("tokenizer.json", *_OLDER))


def read_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of the checkpoint at `path`; None if it has none. Raises CheckpointError if a file is damaged, or
    if the older files do not tell all that a tokenizer.json would."""
    if (file := path / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every kind of damage
            raise CheckpointError(f"{file} is not a usable tokenizer ({error}); fetch it again") from None
    if not has_tokenizer(path):
        return None
    vocabulary, merges = (path / name for name in _OLDER)
    for file in (vocabulary, merges):
        if not file.exists():
            raise CheckpointError(f"{path} has neither tokenizer.json nor {file.name}; fetch one of them")
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # noqa: BLE001 - as above
        raise CheckpointError(f"{vocabulary} and {merges.name} are no usable tokenizer ({error})") from None
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, path)
    return backend


def tokenizer_json(path: Path) -> str:
    """The tokenizer of the checkpoint at `path` as the text of a tokenizer.json. Raises CheckpointError if there is
    none, and what `read_tokenizer` raises."""
    if (file := path / "tokenizer.json").exists():
        return file.read_text(encoding="utf-8")
    backend = read_tokenizer(path)
    if backend is None:
        raise CheckpointError(f"{path} has no tokenizer.json")
    return str(backend.to_str())


def _add_tokens(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Adds the tokens that the checkpoint has besides those of vocab.json, with the ids that its files state."""
    for token_id, token in sorted(_added_tokens(path).items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise _needs_conversion(path, f"{token.content} has the id {token_id}, which leaves a gap")
    for name in read_special_tokens(path).values():
        if backend.token_to_id(name) is None:
            raise _needs_conversion(path, f"no file there tells the id of {name}")


def _added_tokens(path: Path) -> dict[int, AddedToken]:
    """The added tokens of tokenizer_config.json, or else of added_tokens.json, by id."""
    name = "tokenizer_config.json"
    config = read_json_object(path / name)
    try:
        if decoder := config.get("added_tokens_decoder"):
            return {int(number): _token(given) for number, given in decoder.items()}
        name = "added_tokens.json"
        more = config.get("additional_special_tokens") or ()  # texts, or objects of an AddedToken
        more = (each["content"] if isinstance(each, dict) else each for each in more)
        special = {*read_special_tokens(path).values(), *more}
        return {
            int(number): AddedToken(content, special=content in special, normalized=False)
            for content, number in read_json_object(path / name).items()
        }
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise CheckpointError(f"{path / name} does not list tokens and their ids; fetch it again") from None


def _token(given: dict[str, Any]) -> AddedToken:
    return AddedToken(given["content"], **{flag: given[flag] for flag in _FLAGS if flag in given})


def _needs_conversion(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has no tokenizer.json and cannot do without: {why}; write one with transformers: "
        f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    )
