"""Embeddings, reranking and scoring on one replica: a real engine in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import LLM
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.rerank import parse_rerank, parse_score
from serve_app.apis.shared.pooling import MOST_INPUTS, PoolingRequest
from serve_app.apis.tokens import parse_tokenize
from serve_app.replica.request_handler import RequestHandler
from tests.adapters import ATTENTION, write_adapter
from tests.checkpoints import write_reader
from tests.serve_app.support import wait_for

QUERY = "What colour is the sea?"
DOCUMENTS = ["Foxes are small.", "The sea is blue.", "", "Ships sail on the sea."]
Parse = Callable[[bytes], PoolingRequest]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader(tmp_path_factory.mktemp("reader"), ending="<|endoftext|>")


@pytest.fixture(scope="module")
def engine(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), path, ATTENTION)
    lora: Any = f"mine={adapter}"
    engine = AsyncEngine(
        EngineConfig(model=str(path), device="cpu", dtype="float32", num_blocks=256, lora=lora)
    )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(str(path), dtype="float32", num_blocks=256, use_tqdm=False) as llm:
        yield llm


def ask(engine: AsyncEngine, parse: Parse, **body: Any) -> Any:
    handler = RequestHandler(engine, "m", {})
    return json.loads(asyncio.run(handler.respond(parse(json.dumps(body).encode()))))


def vectors(answer: Any) -> list[list[float]]:
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return [each["embedding"] for each in answer["data"]]


def refusal(engine: AsyncEngine, parse: Parse, **body: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        ask(engine, parse, **body)
    return error.value


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-5)


def test_each_input_gets_its_vector_in_openais_form(engine: AsyncEngine, llm: LLM) -> None:
    answer = ask(engine, parse_embedding, input=["the sea", "a fox"])
    assert answer["object"] == "list" and answer["model"] == "m"
    assert answer["data"][0]["object"] == "embedding"
    for ours, theirs in zip(vectors(answer), llm.embed(["the sea", "a fox"]), strict=True):
        assert ours == near(theirs) and sum(x * x for x in ours) == near(1)
    count = sum(len(ids) for ids in tokenized(engine, "the sea", "a fox"))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}


def tokenized(engine: AsyncEngine, *texts: str) -> list[list[int]]:
    handler = RequestHandler(engine, "m", {})
    bodies = [parse_tokenize(json.dumps({"prompt": text}).encode()) for text in texts]
    return [json.loads(asyncio.run(handler.respond(body)))["tokens"] for body in bodies]


def test_an_input_may_be_text_or_token_ids_or_a_list_of_either(engine: AsyncEngine) -> None:
    [ids] = tokenized(engine, "the sea")
    [expected] = vectors(ask(engine, parse_embedding, input="the sea"))
    for given in (ids, [ids], ["the sea"]):
        assert vectors(ask(engine, parse_embedding, input=given)) == [near(expected)]
    mixed = vectors(ask(engine, parse_embedding, input=[ids, "the sea"]))
    assert mixed == [near(expected), near(expected)]


def test_a_text_gets_what_the_tokenizer_puts_after_it_unless_told_not_to(engine: AsyncEngine) -> None:
    [ids] = tokenized(engine, "the sea")
    bare = ask(engine, parse_embedding, input="the sea", add_special_tokens=False)
    assert bare["usage"]["prompt_tokens"] == len(ids) - 1
    assert vectors(bare) == [near(each) for each in vectors(ask(engine, parse_embedding, input=ids[:-1]))]


def test_base64_holds_little_endian_fp32(engine: AsyncEngine) -> None:
    [plain] = vectors(ask(engine, parse_embedding, input="the sea", encoding_format="float"))
    [packed] = vectors(ask(engine, parse_embedding, input="the sea", encoding_format="base64"))
    data = base64.b64decode(packed)  # type: ignore[arg-type]
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == near(plain)


def test_dimensions_cut_a_vector_before_its_length_is_made_1(engine: AsyncEngine, llm: LLM) -> None:
    short = ask(engine, parse_embedding, input="the sea", dimensions=7)
    assert vectors(short) == [near(each) for each in llm.embed("the sea", dimensions=7)]
    raw = ask(engine, parse_embedding, input="the sea", normalize=False)
    assert vectors(raw) == [near(each) for each in llm.embed("the sea", normalize=False)]


def test_the_model_that_is_named_may_be_an_adapter(engine: AsyncEngine) -> None:
    base, named, adapted = (
        ask(engine, parse_embedding, input="the sea", **fields)
        for fields in ({}, {"model": "m"}, {"model": "mine"})
    )
    assert (base["model"], named["model"], adapted["model"]) == ("m", "m", "mine")
    assert vectors(base) == [near(each) for each in vectors(named)] != vectors(adapted)
    assert vectors(adapted) != [near(each) for each in vectors(base)]


def test_documents_are_ranked_by_relevance(engine: AsyncEngine, llm: LLM) -> None:
    answer = ask(engine, parse_rerank, query=QUERY, documents=DOCUMENTS, instruction="Find facts")
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True) and all(0 < score < 1 for score in scores)
    assert {r["index"]: r["relevance_score"] for r in answer["results"]} == {
        index: near(score) for index, score in enumerate(llm.rerank(QUERY, DOCUMENTS, "Find facts"))
    }
    assert all(r["document"] == {"text": DOCUMENTS[r["index"]]} for r in answer["results"])
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 100


def test_a_ranking_shows_what_is_asked_for(engine: AsyncEngine) -> None:
    whole = ask(engine, parse_rerank, query=QUERY, documents=DOCUMENTS)["results"]
    objects = [{"text": text, "title": "x"} for text in DOCUMENTS]
    best = ask(engine, parse_rerank, query=QUERY, documents=objects, top_n=2)["results"]
    assert best == [{**result, "relevance_score": near(result["relevance_score"])} for result in whole[:2]]
    bare = ask(engine, parse_rerank, query=QUERY, documents=DOCUMENTS, return_documents=False, top_n=99)
    assert [result["index"] for result in bare["results"]] == [result["index"] for result in whole]
    assert all("document" not in result for result in bare["results"])


def test_texts_are_scored_one_to_one_one_to_many_and_in_pairs(engine: AsyncEngine, llm: LLM) -> None:
    expected = [near(score) for score in llm.rerank(QUERY, DOCUMENTS)]

    def scores(first: Any, second: Any) -> list[float]:
        answer = ask(engine, parse_score, text_1=first, text_2=second)
        assert answer["object"] == "list" and all(each["object"] == "score" for each in answer["data"])
        return [each["score"] for each in answer["data"]]

    assert scores(QUERY, DOCUMENTS[1]) == scores([QUERY], DOCUMENTS[1]) == expected[1:2]
    assert scores(QUERY, DOCUMENTS) == scores([QUERY], DOCUMENTS) == expected
    other = llm.rerank("Which animals are small?", DOCUMENTS[:1])
    assert scores(["Which animals are small?", QUERY], DOCUMENTS[:2]) == [near(other[0]), expected[1]]


@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (parse_embedding, {}, "input"),
        (parse_embedding, {"input": ""}, "input"),
        (parse_embedding, {"input": []}, "input"),
        (parse_embedding, {"input": ["x", ""]}, "input"),
        (parse_embedding, {"input": [[1], []]}, "input"),
        (parse_embedding, {"input": ["x"] * (MOST_INPUTS + 1)}, "input"),
        (parse_embedding, {"input": [5, 4096]}, "input"),
        (parse_embedding, {"input": ["x", [5, 4096]]}, "input[1]"),
        (parse_embedding, {"input": ["x", "the sea " * 5000]}, "input[1]"),
        (parse_embedding, {"input": "the sea " * 10**6}, "input"),
        (parse_embedding, {"input": "x", "dimensions": 0}, "dimensions"),
        (parse_embedding, {"input": "x", "dimensions": 193}, "dimensions"),
        (parse_embedding, {"input": "x", "encoding_format": "int8"}, "encoding_format"),
        (parse_embedding, {"input": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        (parse_rerank, {"query": "x", "documents": ["y"], "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        (parse_rerank, {"query": "x"}, "documents"),
        (parse_rerank, {"documents": ["x"]}, "query"),
        (parse_rerank, {"query": "x", "documents": []}, "documents"),
        (parse_rerank, {"query": "x", "documents": "x"}, "documents"),
        (parse_rerank, {"query": "x", "documents": [{"title": "x"}]}, "documents[0].text"),
        (parse_rerank, {"query": "x", "documents": ["x"], "top_n": -1}, "top_n"),
        (parse_rerank, {"query": "x", "documents": ["x", "the sea " * 5000]}, "documents[1]"),
        (parse_score, {"text_1": ["x", "y"], "text_2": "x"}, "text_1"),
        (parse_score, {"text_1": ["x", "y"], "text_2": ["x"] * 4}, "text_1"),
        (parse_score, {"text_1": "x", "text_2": []}, "text_2"),
        (parse_score, {"text_1": "x", "text_2": "the sea " * 5000}, "text_2"),
    ],
)
def test_a_bad_request_is_told_where_it_is_bad(
    engine: AsyncEngine, parse: Parse, body: dict[str, Any], param: str
) -> None:
    error = refusal(engine, parse, **body)
    assert (error.status, error.param) == (400, param)
    wait_for(lambda: is_idle(engine))


def is_idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.num_running + stats.num_waiting == 0 and stats.free_blocks == stats.total_blocks


def test_a_client_that_leaves_takes_all_its_inputs_along(engine: AsyncEngine) -> None:
    async def leave() -> None:
        handler = RequestHandler(engine, "m", {})
        inputs = ["the sea " * 200 + str(number) for number in range(200)]
        answer = asyncio.ensure_future(
            handler.respond(parse_embedding(json.dumps({"input": inputs}).encode()))
        )
        while is_idle(engine):
            await asyncio.sleep(0.001)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer

    asyncio.run(leave())
    wait_for(lambda: is_idle(engine))


def test_a_model_that_cannot_rank_says_so(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundled_path() / name, tmp_path)
    for model, why in (("", 'no tokens "yes" and "no"'), (str(tmp_path), "no tokenizer")):
        engine = AsyncEngine(EngineConfig(model=model, device="cpu", num_blocks=64))
        error = refusal(engine, parse_rerank, query="x", documents=["y"])
        assert why in str(error) and (error.status, error.param) == (400, "model")
        assert vectors(ask(engine, parse_embedding, input=[5, 6]))
        engine.shutdown()
    assert refusal(engine, parse_embedding, input="x").param == "input"
