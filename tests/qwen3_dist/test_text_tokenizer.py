"""The tokenizer agrees with transformers', and reads what ends a generation from the checkpoint's files."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.text.tokenizer import Tokenizer, read_generation_defaults

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "qwen3_dist" / "bundled"
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"
DIRECTORIES = [
    pytest.param(BUNDLED, id="bundled"),
    pytest.param(REAL, id="real", marks=pytest.mark.skipif(not REAL.exists(), reason="not at hand")),
]
TEXTS = [
    "",
    "Hello, world! It's 12:34.",
    "<|im_start|>user\nHi<|im_end|>\n<think>\n\n</think>\n\n<tool_call>{}</tool_call><|endoftext|>",
    "日本語 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦🇫🇷 e\u0301 \u00e9 ﬁ \u200b\u00a0",
    "  spaces \t\r\n\n and   lines\n  ",
    "def f(x):\n    return {'a': [1, 2.5e-3]}\n",
]


def loaded(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    return tokenizer


BUNDLED_TOKENIZER = loaded(BUNDLED)


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_ids_and_text_equal_those_of_transformers(directory: Path) -> None:
    oracle = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)
    tokenizer = loaded(directory)
    random_ids = random.Random(0).sample(range(tokenizer.vocab_size), 500)
    for ids in [random_ids, *map(tokenizer.encode, TEXTS)]:
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert [tokenizer.encode(text) for text in TEXTS] == [
        oracle.encode(text, add_special_tokens=False) for text in TEXTS
    ]
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.special_token_ids == set(oracle.all_special_ids)


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_ids_past_the_vocabulary_stand_for_no_text(directory: Path) -> None:
    tokenizer = loaded(directory)
    padding = [tokenizer.vocab_size, tokenizer.vocab_size + 200, 2**31]
    assert tokenizer.decode([*padding, *tokenizer.encode("Hi"), *padding]) == "Hi"
    assert [tokenizer.token_bytes(token_id) for token_id in padding] == [b"", b"", b""]


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_token_bytes_are_what_decoding_joins(directory: Path) -> None:
    tokenizer = loaded(directory)
    ids = range(tokenizer.vocab_size)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    assert joined == tokenizer.decode(ids, skip_special_tokens=False)


def test_added_tokens_outside_the_byte_alphabet_keep_their_text() -> None:
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    backend.add_tokens(["<｜User｜>"])
    tokenizer = Tokenizer(backend)
    (token_id,) = tokenizer.encode("<｜User｜>")
    assert tokenizer.token_bytes(token_id).decode() == tokenizer.decode([token_id]) == "<｜User｜>"


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        BUNDLED_TOKENIZER.encode("a\ud800b")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_bundled_tokenizer_gives_every_text_back_in_nfc(text: str) -> None:
    assert BUNDLED_TOKENIZER.decode(BUNDLED_TOKENIZER.encode(text), False) == unicodedata.normalize(
        "NFC", text
    )


GENERATION, TOKENIZER, CONFIG = "generation_config.json", "tokenizer_config.json", "config.json"
END = {TOKENIZER: {"eos_token": "<|im_end|>"}}
EOS_CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({GENERATION: {"eos_token_id": 4070}, **END, CONFIG: {"eos_token_id": 4072}}, (4070, 4072)),
    ({GENERATION: {"eos_token_id": [7, 8]}, **END, CONFIG: {"eos_token_id": 9}}, (7, 8, 4072, 9)),
    ({GENERATION: {"eos_token_id": [8, 7]}, CONFIG: {"eos_token_id": [7, 9]}}, (8, 7, 9)),
    ({GENERATION: {"eos_token_id": 7}, CONFIG: {"eos_token_id": 9}}, (7, 9)),
    ({**END, CONFIG: {"eos_token_id": 9}}, (4072, 9)),
    ({TOKENIZER: {"eos_token": {"content": "<|im_end|>"}}, GENERATION: {"eos_token_id": []}}, (4072,)),
    ({TOKENIZER: {"eos_token": None}, CONFIG: {"eos_token_id": 9}}, (9,)),
    ({GENERATION: {"eos_token_id": 7}}, (7,)),
    ({}, ()),
]


@pytest.mark.parametrize(("files", "expected"), EOS_CASES)
def test_eos_ids_are_those_of_all_files_that_state_some(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert loaded(tmp_path).eos_token_ids == expected


def test_a_directory_without_tokenizer_json_has_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a usable tokenizer"),
        ("tokenizer.json", "{}", "not a usable tokenizer"),
        ("generation_config.json", "[1]", "JSON object"),
        ("generation_config.json", '{"eos_token_id": "<|im_end|>"}', "eos_token_id"),
        ("config.json", '{"eos_token_id": true}', "eos_token_id"),
        ("config.json", '{"eos_token_id": [1, -1]}', "eos_token_id"),
    ],
)
def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="has no byte-level tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 1},
         {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.7, "top_k": None}, {"temperature": 0.7}),
        ({"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3}),
        ({"do_sample": False, "max_new_tokens": 2048, "eos_token_id": 1}, {"max_tokens": 2048}),
        ({"do_sample": False}, {}),
    ],
)  # fmt: skip
def test_sampling_defaults_are_what_the_file_states(
    tmp_path: Path, generation_config: dict[str, Any], expected: dict[str, Any]
) -> None:
    """As in vLLM, which does not read do_sample."""
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config), encoding="utf-8")
    assert read_generation_defaults(tmp_path) == expected


def test_a_recommendation_that_no_request_may_ask_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_p": 1.5}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="recommends an invalid value: top_p must be"):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("stated", "said"),
    [({"no_repeat_ngram_size": 3}, True), ({"num_beams": 1, "stop_strings": None, "bos_token_id": 5}, False)],
)
def test_a_recommendation_that_is_not_applied_is_logged(
    tmp_path: Path, stated: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated), encoding="utf-8")
    assert read_generation_defaults(tmp_path) == {}
    assert ("no_repeat_ngram_size=3, which is not applied" in caplog.text) is said
