"""/v1/rerank and /v1/score: the relevance of documents to queries, judged by a Qwen3-Reranker."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Annotated

from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.text.reranking import relevance, relevance_pooling, relevance_prompt
from serve_app.apis.shared.body import ByType, Json, Must, Range, about, read_body
from serve_app.apis.shared.pooling import MOST_INPUTS, PoolingBody, PoolingRequest, PoolingResult
from serve_app.apis.shared.prompts import Prompt, PromptRenderer


class _Document(TypedDict):
    text: Annotated[str, about("The document's text.")]


_Documents = Annotated[
    list[
        Annotated[
            str | Annotated[_Document, Must("an object with a text")],
            ByType("a string or an object with a text"),
        ]
    ],
    Must(f"a list of 1 to {MOST_INPUTS} strings or objects with a text", 1, MOST_INPUTS),
]
_OneOrMoreTexts = Annotated[
    str | Annotated[list[str], Must(f"a list of 1 to {MOST_INPUTS} strings", 1, MOST_INPUTS)],
    ByType(f"a string or a list of 1 to {MOST_INPUTS} of them"),
]


class RelevanceBody(PoolingBody):
    """The fields that bodies of /v1/rerank and /v1/score share."""

    instruction: (
        Annotated[str, about("The retrieval task; by default to find passages that answer a web search.")]
        | None
    ) = None
    add_special_tokens: Annotated[
        bool,
        about("Whether the tokenizer adds its special tokens to those of Qwen3-Reranker's prompt."),
    ] = False


class RerankBody(RelevanceBody):
    """A body of /v1/rerank."""

    query: Annotated[str, about("The query.")]
    documents: Annotated[_Documents, about("The documents to rank.")]
    max_tokens_per_doc: Annotated[
        int,
        Range(0),
        about("Truncates documents to this many tokens for ranking; 0 means no limit."),
    ] = 0
    top_n: Annotated[int, Range(0), about("Maximum number of results; 0 returns all.")] = 0
    return_documents: Annotated[bool, about("Whether results include their documents.")] = True


class ScoreBody(RelevanceBody):
    """A body of /v1/score."""

    text_1: Annotated[_OneOrMoreTexts, about("The query, or one for each of text_2.")]
    text_2: Annotated[_OneOrMoreTexts, about("The documents to score.")]


@dataclass(frozen=True)
class RelevanceRequest(PoolingRequest):
    """A request to score each document against the query at its index. `max_tokens` truncates documents."""

    queries: list[str]
    documents: list[str]
    instruction: str | None
    add_special_tokens: bool
    max_tokens: int = field(default=0, kw_only=True)  # 0 means no limit

    @property
    def num_sequences(self) -> int:
        return len(self.documents)

    def pooling(self, renderer: PromptRenderer) -> PoolingParams:
        if renderer.tokenizer is None:
            raise RequestError("this model has no tokenizer, so it cannot rank texts", param="model")
        return relevance_pooling(renderer.tokenizer, renderer.has_score)

    def prompts(self, renderer: PromptRenderer) -> list[Prompt]:
        pairs = enumerate(zip(self.queries, self.documents, strict=True))
        return [
            renderer.tokenize(
                relevance_prompt(query, renderer.truncate(document, self.max_tokens), self.instruction),
                self.input_path(index),
                self.add_special_tokens,
            )
            for index, (query, document) in pairs
        ]

    def answer(self, result: PoolingResult) -> Json:
        return self.score_response(result, [relevance(logits) for logits in result.vectors])

    @abstractmethod
    def score_response(self, result: PoolingResult, scores: list[float]) -> Json:
        """Returns the response body for `scores`, one for each document."""


@dataclass(frozen=True)
class RerankRequest(RelevanceRequest):
    """A parsed request to /v1/rerank."""

    top_n: int
    with_documents: bool

    def input_path(self, index: int) -> str:
        return f"documents[{index}]"

    def score_response(self, result: PoolingResult, scores: list[float]) -> Json:
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top_n or None]
        return result.response("rerank", results=[self._result(index, scores[index]) for index in best])

    def _result(self, index: int, score: float) -> Json:
        document = {"document": {"text": self.documents[index]}} if self.with_documents else {}
        return {"index": index, **document, "relevance_score": score}


@dataclass(frozen=True)
class ScoreRequest(RelevanceRequest):
    """A parsed request to /v1/score. `is_list` tells whether `text_2` was a list."""

    is_list: bool

    def input_path(self, index: int) -> str:
        return f"text_2[{index}]" if self.is_list else "text_2"

    def score_response(self, result: PoolingResult, scores: list[float]) -> Json:
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return result.response("score", object="list", data=data)


def parse_rerank(body: bytes) -> RerankRequest:
    """Parses a body of /v1/rerank. Raises RequestError."""
    given = read_body(RerankBody, body)
    documents = [each if isinstance(each, str) else each["text"] for each in given.documents]
    return RerankRequest(
        given.model,
        given.terms,
        queries=[given.query] * len(documents),
        documents=documents,
        instruction=given.instruction,
        add_special_tokens=given.add_special_tokens,
        max_tokens=given.max_tokens_per_doc,
        top_n=given.top_n,
        with_documents=given.return_documents,
    )


def parse_score(body: bytes) -> ScoreRequest:
    """Parses a body of /v1/score. Raises RequestError."""
    given = read_body(ScoreBody, body)
    documents = [given.text_2] if isinstance(given.text_2, str) else given.text_2
    queries = [given.text_1] if isinstance(given.text_1, str) else given.text_1
    if len(queries) not in (1, len(documents)):
        raise RequestError(
            f"text_1 has {len(queries)} texts and text_2 has {len(documents)}; give one text_1, or as many",
            param="text_1",
        )
    return ScoreRequest(
        given.model,
        given.terms,
        queries=queries * (len(documents) // len(queries)),
        documents=documents,
        instruction=given.instruction,
        add_special_tokens=given.add_special_tokens,
        is_list=documents is given.text_2,
    )
