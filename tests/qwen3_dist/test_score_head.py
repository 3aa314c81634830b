"""Rerankers with a score head, as Qwen3-Reranker is converted to sequence classification, against transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from qwen3_dist import LLM, ModelConfig
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.reranking import relevance_prompt
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.completions import parse_completion
from serve_app.apis.rerank import parse_rerank, parse_score
from serve_app.replica.request_handler import RequestHandler
from tests.checkpoints import DENSE

QUERY, DOCUMENTS = "What colour is the sea?", ["Foxes are small.", "The sea is blue.", "", "Ships sail."]
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded reranker with the bundled tokenizer, whose config.json does not tie the output head that it lacks."""
    path = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(0)
    shape = {**DENSE, "vocab_size": 4200, "num_labels": 1}
    model = Qwen3ForSequenceClassification(Qwen3Config(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_path() / name, path)
    return path


@pytest.fixture(scope="module")
def expected(reranker: Path) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(reranker, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    with torch.no_grad():
        prompts = [tokenizer(relevance_prompt(QUERY, each))["input_ids"] for each in DOCUMENTS]
        scores = [float(model(torch.tensor([ids])).logits[0, 0].sigmoid()) for ids in prompts]
    assert max(scores) - min(scores) > 0.05
    return scores


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,pp=2"])
def test_relevance_is_the_sigmoid_of_the_score(reranker: Path, expected: list[float], layout: str) -> None:
    form = "in_process" if layout == "tp=1" else "processes"
    with LLM(str(reranker), layout=layout, executor=form, num_blocks=64, use_tqdm=False) as llm:
        assert llm.rerank(QUERY, DOCUMENTS, use_tqdm=False) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(RequestError, match="this model scores texts and cannot generate; use /v1/rerank"):
            llm.generate("Hello", use_tqdm=False)


def test_the_apis_rank_and_refuse_to_generate(reranker: Path, expected: list[float]) -> None:
    engine = AsyncEngine(EngineConfig(model=str(reranker), dtype="float32", num_blocks=64))
    try:
        handler = RequestHandler(engine, "m", {})

        def ask(parse: Any, **body: Any) -> Any:
            return json.loads(asyncio.run(handler.respond(parse(json.dumps(body).encode()))))

        ranked = ask(parse_rerank, query=QUERY, documents=DOCUMENTS)["results"]
        assert [each["index"] for each in ranked] == sorted(range(4), key=lambda place: -expected[place])
        scored = ask(parse_score, text_1=QUERY, text_2=DOCUMENTS)["data"]
        assert [each["score"] for each in scored] == pytest.approx(expected, abs=1e-5)
        with pytest.raises(RequestError, match="cannot generate"):
            ask(parse_completion, prompt="Hello", max_tokens=1)
    finally:
        engine.shutdown()


def test_a_classifier_of_several_labels_is_refused() -> None:
    raw = {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}
    for labels in ({}, {"num_labels": 2}, {"id2label": {"0": "a", "1": "b"}}):
        with pytest.raises(CheckpointError, match="a classifier of 2 labels is not supported"):
            ModelConfig.from_dict(raw | labels)
    assert ModelConfig.from_dict(raw | {"id2label": {"0": "a"}}).has_score
