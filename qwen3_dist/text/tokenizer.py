"""A checkpoint's byte-level BPE tokenizer: text to ids, ids to text, and ids to raw bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.text.sidecars import read_eos_token_ids, read_generation_defaults, read_special_tokens
from qwen3_dist.text.tokenizer_files import read_tokenizer

__all__ = ["Tokenizer", "read_generation_defaults"]


def _bytes_of_alphabet() -> dict[str, int]:
    """Returns byte-level BPE's alphabet: the byte for each of its 256 printable characters.

    As defined by GPT-2, printable Latin-1 characters represent themselves, and U+0100 onwards the other bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_alphabet()
_ALPHABET = {byte: char for char, byte in _BYTES.items()}


def spelled_in_bytes(data: bytes) -> str:
    """Returns the spelling of the bytes `data` in a byte-level tokenizer's vocabulary."""
    return "".join(_ALPHABET[byte] for byte in data)


class Tokenizer:
    """Encodes and decodes with a checkpoint's tokenizer.

    `eos_token_ids` end a generation. `longest_token` is the length in bytes of the longest token. The model's
    vocabulary may be padded beyond `vocab_size` with ids that have no text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: Sequence[int] = ()) -> None:
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)), default=0)
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer | None:
        """Reads what `read_tokenizer` finds. Returns None if there is no tokenizer.

        EOS ids are the union of those in generation_config.json, tokenizer_config.json and config.json. Raises
        CheckpointError if a file is unreadable or the tokenizer is not byte-level.
        """
        backend = read_tokenizer(Path(path))
        if backend is None:
            return None
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise CheckpointError(
                f"{path} has no byte-level tokenizer; use the one that the Qwen3 checkpoint came with"
            )
        eos = backend.token_to_id(read_special_tokens(path).get("eos_token", ""))
        return cls(backend, read_eos_token_ids(path, eos))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including added tokens."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token such as `<|im_end|>`, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of `text`. Special tokens written in `text` become their ids.

        `add_special_tokens` adds the tokenizer's special tokens around the text (Qwen3-Embedding: <|endoftext|> after
        it). Raises RequestError for text with a lone surrogate, which JSON can contain.
        """
        try:
            # Unlike `encode`, `encode_batch_fast` releases the GIL and computes no offsets.
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError:
            raise RequestError(
                "the text holds a lone surrogate (\\ud800 to \\udfff); send valid Unicode"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary have no text."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token, possibly part of a character; b"" for an id outside the vocabulary."""
        cached = self._token_bytes.get(token_id)
        if cached is None:
            token = self._backend.id_to_token(token_id) or ""
            is_byte_level = all(
                char in _BYTES for char in token
            )  # else an added token, spelled as plain text
            cached = bytes(_BYTES[char] for char in token) if is_byte_level else token.encode()
            self._token_bytes[token_id] = cached
        return cached
