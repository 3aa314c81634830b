"""Bodies of /v1/rerank and /v1/score and what answers them: how well a Qwen3-Reranker finds texts to fit."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.text.reranking import relevance, relevance_pooling, relevance_prompt
from serve_app.apis.shared.kinds import BOOL, TEXT, Either, Field, Json, ListOf, Record, integer
from serve_app.apis.shared.pooling import MOST_INPUTS, POOLING, Pooled, PoolingRequest, read_pooling
from serve_app.apis.shared.prompts import Prompt, Texts

_ASKING: dict[str, Field] = {
    **POOLING,
    "instruction": Field(TEXT, "What documents are looked for; absent, those that answer a web search."),
    "add_special_tokens": Field(
        BOOL,
        "Whether prompts get what the tokenizer puts around a text beside what Qwen3-Reranker's form has.",
    ),
}
_DOCUMENT = Either(
    "a string or an object with a text",
    (TEXT, Record("an object with a text", {"text": Field(TEXT, "Its text.", required=True)})),
)
_DOCUMENTS = ListOf(
    _DOCUMENT,
    f"a list of 1 to {MOST_INPUTS} strings or objects with a text",
    least=1,
    most=MOST_INPUTS,
)
RERANK_BODY = Record(
    "an object",
    {
        **_ASKING,
        "query": Field(TEXT, "What is looked for.", required=True),
        "documents": Field(_DOCUMENTS, "What is looked through.", required=True),
        "max_tokens_per_doc": Field(
            integer(0), "Cuts each document behind so many tokens; 0 cuts none. Results show them whole."
        ),
        "top_n": Field(integer(0), "Most results, the best ones; 0 is all."),
        "return_documents": Field(
            BOOL, "Whether results have their documents; they do unless this is false."
        ),
    },
)
_TEXTS = Either(
    f"a string or a list of 1 to {MOST_INPUTS} of them",
    (TEXT, ListOf(TEXT, f"a list of 1 to {MOST_INPUTS} strings", least=1, most=MOST_INPUTS)),
)
SCORE_BODY = Record(
    "an object",
    {
        **_ASKING,
        "text_1": Field(_TEXTS, "What is looked for: one text, or one for each of text_2.", required=True),
        "text_2": Field(_TEXTS, "What may be it.", required=True),
    },
)


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
    given = RERANK_BODY.read_body(body)
    documents = [each if isinstance(each, str) else each["text"] for each in given["documents"]]
    return RerankRequest(
        **read_pooling(given),
        queries=[given["query"]] * len(documents),
        documents=documents,
        instruction=given.get("instruction"),
        add_special_tokens=given.get("add_special_tokens", False),
        most_tokens=given.get("max_tokens_per_doc", 0),
        top_n=given.get("top_n", 0),
        with_documents=given.get("return_documents", True),
    )


def parse_score(body: bytes) -> ScoreRequest:
    """Reads a request to score pairs of texts. Raises RequestError."""
    given = SCORE_BODY.read_body(body)
    first, second = given["text_1"], given["text_2"]
    documents = [second] if isinstance(second, str) else second
    queries = [first] if isinstance(first, str) else first
    if len(queries) not in (1, len(documents)):
        raise RequestError(
            f"text_1 has {len(queries)} texts and text_2 {len(documents)}; give one text_1, or as many",
            param="text_1",
        )
    return ScoreRequest(
        **read_pooling(given),
        queries=queries * (len(documents) // len(queries)),
        documents=documents,
        instruction=given.get("instruction"),
        add_special_tokens=given.get("add_special_tokens", False),
        is_list=documents is second,
    )
