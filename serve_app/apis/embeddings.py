"""Bodies of /v1/embeddings and what answers them."""

from __future__ import annotations

import base64
import struct
from array import array
from dataclasses import dataclass
from typing import Annotated, Literal

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from serve_app.apis.shared.body import Json, Range, about, read_body
from serve_app.apis.shared.pooling import MOST_INPUTS, Pooled, PoolingBody, PoolingRequest
from serve_app.apis.shared.prompts import Prompt, Prompts, Texts, as_prompts


class EmbeddingBody(PoolingBody):
    """A body of /v1/embeddings."""

    input: Annotated[Prompts, about("What to embed; token ids are taken as they are.")]
    dimensions: (
        Annotated[int, Range(1), about("Keeps so many numbers, the first ones, of each vector.")] | None
    ) = None
    encoding_format: Annotated[
        Literal["float", "base64"], about("Numbers, or the bytes of little-endian fp32 in base64.")
    ] = "float"
    normalize: Annotated[bool, about("Whether vectors have length 1.")] = True
    add_special_tokens: Annotated[
        bool, about("Whether texts get what the tokenizer puts around them, as is usual.")
    ] = True


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
    given = read_body(EmbeddingBody, body)
    inputs = as_prompts(given.input)
    if len(inputs) > MOST_INPUTS:
        raise RequestError(
            f"input has {len(inputs)} items, more than {MOST_INPUTS}; send several requests", param="input"
        )
    return EmbeddingRequest(
        given.model,
        given.priority,
        inputs=inputs,
        is_list=inputs is given.input,
        params=PoolingParams(given.dimensions, given.normalize),
        as_base64=given.encoding_format == "base64",
        add_special_tokens=given.add_special_tokens,
    )


def _as_base64(vector: array[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
