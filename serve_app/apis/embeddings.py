"""Bodies of /v1/embeddings and what answers them."""

from __future__ import annotations

import base64
import struct
from array import array
from dataclasses import dataclass

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from serve_app.apis.completions.request import PROMPT, as_prompts
from serve_app.apis.shared.kinds import BOOL, Field, Json, Record, integer, one_of
from serve_app.apis.shared.pooling import MOST_INPUTS, POOLING, Pooled, PoolingRequest, read_pooling
from serve_app.apis.shared.prompts import Prompt, Texts

EMBEDDING_BODY = Record(
    "an object",
    {
        **POOLING,
        "input": Field(PROMPT, "What to embed; token ids are taken as they are.", required=True),
        "dimensions": Field(integer(1), "Keeps so many numbers, the first ones, of each vector."),
        "encoding_format": Field(
            one_of("float", "base64"), "Numbers, or the bytes of little-endian fp32 in base64."
        ),
        "normalize": Field(BOOL, "Whether vectors have length 1; they do unless this is false."),
        "add_special_tokens": Field(
            BOOL, "Whether texts get what the tokenizer puts around them, as is usual."
        ),
    },
)


@dataclass(frozen=True)
class EmbeddingRequest(PoolingRequest):
    """A body of /v1/embeddings; `is_list` if its input was a list of texts or prompts."""

    inputs: list[str | list[int]]
    is_list: bool
    params: PoolingParams
    as_base64: bool
    add_special_tokens: bool

    @property
    def num_sequences(self) -> int:
        return len(self.inputs)

    def pooling(self, texts: Texts) -> PoolingParams:
        return self.params

    def prompts(self, texts: Texts) -> list[Prompt]:
        return [
            texts.prompt(given, self.place(index), self.add_special_tokens)
            if isinstance(given, str)
            else Prompt(given)
            for index, given in enumerate(self.inputs)
        ]

    def place(self, index: int) -> str:
        return f"input[{index}]" if self.is_list else "input"

    def answer(self, pooled: Pooled) -> Json:
        encode = _as_base64 if self.as_base64 else list
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(pooled.vectors)
        ]
        return pooled.form("embd", object="list", data=data)


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """Reads a request to embed. Raises RequestError."""
    given = EMBEDDING_BODY.read_body(body)
    inputs = as_prompts(given["input"])
    if len(inputs) > MOST_INPUTS:
        raise RequestError(
            f"input has {len(inputs)} items, more than {MOST_INPUTS}; send several requests", param="input"
        )
    return EmbeddingRequest(
        **read_pooling(given),
        inputs=inputs,
        is_list=inputs is given["input"],
        params=PoolingParams(given.get("dimensions"), given.get("normalize", True)),
        as_base64=given.get("encoding_format") == "base64",
        add_special_tokens=given.get("add_special_tokens", True),
    )


def _as_base64(vector: array[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
