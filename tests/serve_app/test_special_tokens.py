"""What a tokenizer puts around a text: by default around prompts, around conversations if asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.rerank import parse_rerank, parse_score
from serve_app.apis.shared.prompts import PromptRenderer
from serve_app.apis.tokens import parse_tokenize
from tests.checkpoints import write_reader

CHAT = {"messages": [{"role": "user", "content": "the sea"}]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader(tmp_path_factory.mktemp("special"), ending="<|endoftext|>")


@pytest.fixture(scope="module")
def renderer(path: Path) -> PromptRenderer:
    return PromptRenderer(Tokenizer.from_directory(path), ChatTemplate.from_directory(path), 4096)


def token_ids(renderer: PromptRenderer, parse: Any, **fields: Any) -> list[int]:
    """The token ids of the first prompt that a body of `fields` gives."""
    request = parse(json.dumps(fields).encode())
    if parse is parse_tokenize:
        tokens: list[int] = request.respond(renderer)["tokens"]
        return tokens
    found: list[int] = request.prompts(renderer)[0].token_ids
    return found


def ends(renderer: PromptRenderer, parse: Any, **fields: Any) -> bool:
    assert renderer.tokenizer is not None
    return token_ids(renderer, parse, **fields)[-1] == renderer.tokenizer.token_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("parse", "fields", "default"),
    [
        (parse_completion, {"prompt": "the sea"}, True),
        (parse_completion, {"prompt": ["the sea", "the sky"]}, True),
        (parse_tokenize, {"prompt": "the sea"}, True),
        (parse_embedding, {"input": "the sea"}, True),
        (parse_chat, CHAT, False),
        (parse_tokenize, CHAT, False),
        (parse_score, {"text_1": "the sea", "text_2": "the sky"}, False),
        (parse_rerank, {"query": "the sea", "documents": ["the sky"]}, False),
    ],
)
def test_special_tokens_come_as_the_field_says_and_by_default_as_in_vllm(
    renderer: PromptRenderer, parse: Any, fields: dict[str, Any], default: bool
) -> None:
    """Qwen3-Reranker's form is a conversation, so it has them in its text already."""
    assert ends(renderer, parse, **fields) is default
    assert ends(renderer, parse, **fields, add_special_tokens=True)
    assert not ends(renderer, parse, **fields, add_special_tokens=False)


@pytest.mark.parametrize("said", [{}, {"add_special_tokens": True}, {"add_special_tokens": False}])
def test_tokenize_counts_what_a_generation_reads(renderer: PromptRenderer, said: dict[str, bool]) -> None:
    assert token_ids(renderer, parse_tokenize, prompt="the sea", **said) == token_ids(
        renderer, parse_completion, prompt="the sea", **said
    )
    assert token_ids(renderer, parse_tokenize, **CHAT, **said) == token_ids(
        renderer, parse_chat, **CHAT, **said
    )


def test_token_ids_are_taken_as_they_are(renderer: PromptRenderer) -> None:
    assert token_ids(renderer, parse_completion, prompt=[5, 6], add_special_tokens=True) == [5, 6]


def test_offline_generation_does_as_the_service_does(path: Path, renderer: PromptRenderer) -> None:
    once = SamplingParams(max_tokens=1)
    with LLM(str(path), num_blocks=64, use_tqdm=False) as llm:
        [plain] = llm.generate("the sea", once, use_tqdm=False)
        [bare] = llm.generate("the sea", once, use_tqdm=False, add_special_tokens=False)
        [chat] = llm.chat(CHAT["messages"], once, use_tqdm=False)
    assert plain.prompt_token_ids == token_ids(renderer, parse_completion, prompt="the sea")
    assert bare.prompt_token_ids == plain.prompt_token_ids[:-1]
    assert chat.prompt_token_ids == token_ids(renderer, parse_chat, **CHAT)
