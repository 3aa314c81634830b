"""Bodies of /v1/rerank and /v1/score and what answers them: how well a Qwen3-Reranker finds texts to fit."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Annotated

from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.text.reranking import relevance, relevance_pooling, relevance_prompt
from serve_app.apis.shared.body import ByType, Json, Must, Range, about, read_body
from serve_app.apis.shared.pooling import MOST_INPUTS, Pooled, PoolingBody, PoolingRequest
from serve_app.apis.shared.prompts import Prompt, Texts


class _Document(TypedDict):
    text: Annotated[str, about("Its text.")]


_Documents = Annotated[
    list[
        Annotated[
            str | Annotated[_Document, Must("an object with a text")],
            ByType("a string or an object with a text"),
        ]
    ],
    Must(f"a list of 1 to {MOST_INPUTS} strings or objects with a text", 1, MOST_INPUTS),
]
_Texts = Annotated[
    str | Annotated[list[str], Must(f"a list of 1 to {MOST_INPUTS} strings", 1, MOST_INPUTS)],
    ByType(f"a string or a list of 1 to {MOST_INPUTS} of them"),
]


class RelevanceBody(PoolingBody):
    """The fields that both have."""

    instruction: (
        Annotated[str, about("What documents are looked for; absent, those that answer a web search.")] | None
    ) = None
    add_special_tokens: Annotated[
        bool,
        about(
            "Whether prompts get what the tokenizer puts around a text beside what Qwen3-Reranker's form has."
        ),
    ] = False


class RerankBody(RelevanceBody):
    """A body of /v1/rerank."""

    query: Annotated[str, about("What is looked for.")]
    documents: Annotated[_Documents, about("What is looked through.")]
    max_tokens_per_doc: Annotated[
        int,
        Range(0),
        about("Cuts each document behind so many tokens; 0 cuts none. Results show them whole."),
    ] = 0
    top_n: Annotated[int, Range(0), about("Most results, the best ones; 0 is all.")] = 0
    return_documents: Annotated[bool, about("Whether results have their documents.")] = True


class ScoreBody(RelevanceBody):
    """A body of /v1/score."""

    text_1: Annotated[_Texts, about("What is looked for: one text, or one for each of text_2.")]
    text_2: Annotated[_Texts, about("What may be it.")]


@dataclass(frozen=True)
class RelevanceRequest(PoolingRequest):
    """Asks of each document whether it fits the query beside it."""

    queries: list[str]
    documents: list[str]
    instruction: str | None
    add_special_tokens: bool
    most_tokens: int = field(default=0, kw_only=True)  # of a document; 0 is all

    @property
    def num_sequences(self) -> int:
        return len(self.documents)

    def pooling(self, texts: Texts) -> PoolingParams:
        if texts.tokenizer is None:
            raise RequestError("this model has no tokenizer, so it cannot rank texts", param="model")
        return relevance_pooling(texts.tokenizer)

    def prompts(self, texts: Texts) -> list[Prompt]:
        pairs = enumerate(zip(self.queries, self.documents, strict=True))
        return [
            texts.prompt(
                relevance_prompt(query, texts.cut(document, self.most_tokens), self.instruction),
                self.place(index),
                self.add_special_tokens,
            )
            for index, (query, document) in pairs
        ]

    def answer(self, pooled: Pooled) -> Json:
        return self.scored(pooled, [relevance(logits) for logits in pooled.vectors])

    @abstractmethod
    def scored(self, pooled: Pooled, scores: list[float]) -> Json:
        """The answer, a score for each document."""


@dataclass(frozen=True)
class RerankRequest(RelevanceRequest):
    """A body of /v1/rerank."""

    top_n: int
    with_documents: bool

    def place(self, index: int) -> str:
        return f"documents[{index}]"

    def scored(self, pooled: Pooled, scores: list[float]) -> Json:
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top_n or None]
        return pooled.form("rerank", results=[self._result(index, scores[index]) for index in best])

    def _result(self, index: int, score: float) -> Json:
        shown = {"document": {"text": self.documents[index]}} if self.with_documents else {}
        return {"index": index, **shown, "relevance_score": score}


@dataclass(frozen=True)
class ScoreRequest(RelevanceRequest):
    """A body of /v1/score; `is_list` if its second text was a list."""

    is_list: bool

    def place(self, index: int) -> str:
        return f"text_2[{index}]" if self.is_list else "text_2"

    def scored(self, pooled: Pooled, scores: list[float]) -> Json:
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return pooled.form("score", object="list", data=data)


def parse_rerank(body: bytes) -> RerankRequest:
    """Reads a request to rank documents. Raises RequestError."""
    given = read_body(RerankBody, body)
    documents = [each if isinstance(each, str) else each["text"] for each in given.documents]
    return RerankRequest(
        given.model,
        given.priority,
        queries=[given.query] * len(documents),
        documents=documents,
        instruction=given.instruction,
        add_special_tokens=given.add_special_tokens,
        most_tokens=given.max_tokens_per_doc,
        top_n=given.top_n,
        with_documents=given.return_documents,
    )


def parse_score(body: bytes) -> ScoreRequest:
    """Reads a request to score pairs of texts. Raises RequestError."""
    given = read_body(ScoreBody, body)
    documents = [given.text_2] if isinstance(given.text_2, str) else given.text_2
    queries = [given.text_1] if isinstance(given.text_1, str) else given.text_1
    if len(queries) not in (1, len(documents)):
        raise RequestError(
            f"text_1 has {len(queries)} texts and text_2 {len(documents)}; give one text_1, or as many",
            param="text_1",
        )
    return ScoreRequest(
        given.model,
        given.priority,
        queries=queries * (len(documents) // len(queries)),
        documents=documents,
        instruction=given.instruction,
        add_special_tokens=given.add_special_tokens,
        is_list=documents is given.text_2,
    )
