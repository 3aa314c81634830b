"""A tokenizer of vocab.json and merges.txt is the one that transformers makes of them, and of the tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Tokenizer

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import CheckpointError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.text.tokenizer_files import tokenizer_json
from tests.qwen3_dist.test_text_tokenizer import BUNDLED, REAL, TEXTS

CONFIG = "tokenizer_config.json"
MORE_TEXTS = [
    *TEXTS,
    "I'VE I'd can't  we'll\u3000x١٢٣ 12\r\n\r\n\tño ÀÉ ½ <|im_end|>\u2028!!\n\n",
    "<think>a</think> 3.14",
]


def write_older(path: Path, directory: Path, tokens_in: str = CONFIG) -> Path:
    """The tokenizer of `directory` without its tokenizer.json. Added tokens are in `tokens_in`."""
    given = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    path.mkdir(exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(given["model"]["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in given["model"]["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    added = {token["id"]: token for token in given["added_tokens"]}
    config.pop("added_tokens_decoder", None)
    if tokens_in == CONFIG:
        config["added_tokens_decoder"] = {
            str(number): {name: value for name, value in token.items() if name != "id"}
            for number, token in added.items()
        }
    else:
        ids = {token["content"]: number for number, token in added.items()}
        (path / tokens_in).write_text(json.dumps(ids), encoding="utf-8")
        config["additional_special_tokens"] = [each["content"] for each in added.values() if each["special"]]
    (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return path


def loaded(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("tokens_in", [CONFIG, "added_tokens.json"])
def test_ids_are_those_that_transformers_makes_of_the_files(tmp_path: Path, tokens_in: str) -> None:
    path = write_older(tmp_path, BUNDLED, tokens_in)
    tokenizer, whole = loaded(path), loaded(BUNDLED)
    theirs = Qwen2Tokenizer.from_pretrained(path)
    ours, rules = json.loads(tokenizer_json(path)), json.loads(theirs.backend_tokenizer.to_str())
    assert [ours[name] for name in ("normalizer", "pre_tokenizer")] == [
        rules[name] for name in ("normalizer", "pre_tokenizer")
    ]
    assert [tokenizer.encode(text) for text in MORE_TEXTS] == [
        theirs.encode(text, add_special_tokens=False) for text in MORE_TEXTS
    ]
    assert tokenizer.vocab_size == whole.vocab_size == len(theirs)
    assert tokenizer.special_token_ids == whole.special_token_ids
    assert tokenizer.eos_token_ids == (4072,)


def test_special_tokens_may_be_objects_or_null(tmp_path: Path) -> None:
    path = write_older(tmp_path, BUNDLED, "added_tokens.json")
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    special = loaded(path).special_token_ids
    objects = [{"content": name, "special": True} for name in config["additional_special_tokens"]]
    for given, expected in ((objects, special), (None, frozenset({4070, 4072}))):
        (path / CONFIG).write_text(json.dumps({**config, "additional_special_tokens": given}))
        assert loaded(path).special_token_ids == expected


@pytest.mark.skipif(not REAL.exists(), reason="not at hand")
def test_ids_are_those_of_qwens_own_tokenizer(tmp_path: Path) -> None:
    tokenizer, whole = loaded(write_older(tmp_path, REAL)), loaded(REAL)
    texts = [*MORE_TEXTS, Path(__file__).read_text(), (BUNDLED / "chat_template.jinja").read_text()]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == whole.encode(text)
        assert tokenizer.decode(ids, False) == whole.decode(ids, False)
    assert (tokenizer.vocab_size, tokenizer.special_token_ids) == (whole.vocab_size, whole.special_token_ids)


def test_a_checkpoint_of_older_files_generates_also_by_a_grammar(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path, dirs_exist_ok=True)
    write_older(tmp_path, BUNDLED)
    (tmp_path / "tokenizer.json").unlink()
    params = SamplingParams(
        max_tokens=12, temperature=0, structured_outputs=StructuredOutputs(choice=("Paris", "Rome"))
    )
    with LLM(str(tmp_path), num_blocks=64, use_tqdm=False) as llm:
        [output] = llm.generate("The capital of France is ", params, use_tqdm=False)
    assert output.text in ("Paris", "Rome")


def test_the_end_of_a_turn_may_be_in_special_tokens_map(tmp_path: Path) -> None:
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    older = tmp_path / "special_tokens_map.json"
    older.write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}))
    assert loaded(tmp_path).eos_token_ids == (4072,)
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert loaded(tmp_path).eos_token_ids == (4070,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"merges.txt": None}, r"has neither tokenizer.json nor merges.txt"),
        ({"vocab.json": None}, r"has neither tokenizer.json nor vocab.json"),
        ({"vocab.json": "{"}, r"vocab.json and merges.txt are no usable tokenizer \("),
        ({CONFIG: {"eos_token": "<|im_end|>"}}, r"no file there tells the id of <\|im_end\|>; write one with trans"),
        ({CONFIG: {"added_tokens_decoder": {"9000": {"content": "<x>"}}}}, "<x> has the id 9000, which leaves a gap"),
        ({CONFIG: {"added_tokens_decoder": {"a": {"content": "<x>"}}}}, f"{CONFIG} does not list tokens and"),
        ({CONFIG: {"added_tokens_decoder": {"4070": {"text": "<x>"}}}}, f"{CONFIG} does not list tokens and"),
        ({CONFIG: {}, "added_tokens.json": {"<x>": "a"}}, "added_tokens.json does not list tokens"),
    ],
)  # fmt: skip
def test_files_that_do_not_tell_the_ids_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    path = write_older(tmp_path, BUNDLED)
    for name, content in changes.items():
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=sentence):
        Tokenizer.from_directory(path)
