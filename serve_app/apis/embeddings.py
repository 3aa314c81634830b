"""OpenAI's embeddings (/v1/embeddings): request and answer."""

from __future__ import annotations

import base64
import struct
from array import array
from dataclasses import dataclass
from typing import Annotated, Literal

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from serve_app.apis.shared.body import Json, Range, about, read_body
from serve_app.apis.shared.pooling import MOST_INPUTS, PoolingBody, PoolingRequest, PoolingResult
from serve_app.apis.shared.prompts import Prompt, PromptRenderer, Prompts, as_prompts


class EmbeddingBody(PoolingBody):
    """A body of /v1/embeddings."""

    input: Annotated[Prompts, about("The texts to embed, or their token ids.")]
    dimensions: Annotated[int, Range(1), about("Truncates each vector to this many dimensions.")] | None = (
        None
    )
    encoding_format: Annotated[
        Literal["float", "base64"], about("float: numbers; base64: little-endian fp32 bytes.")
    ] = "float"
    normalize: Annotated[bool, about("Whether vectors are scaled to length 1.")] = True
    add_special_tokens: Annotated[
        bool, about("Whether the tokenizer adds its special tokens to texts, as embedding models expect.")
    ] = True


@dataclass(frozen=True)
class EmbeddingRequest(PoolingRequest):
    """A parsed request to /v1/embeddings. `is_list` tells whether `input` was a list of prompts."""

    inputs: list[str | list[int]]
    is_list: bool
    params: PoolingParams
    as_base64: bool
    add_special_tokens: bool

    @property
    def num_sequences(self) -> int:
        return len(self.inputs)

    def pooling(self, renderer: PromptRenderer) -> PoolingParams:
        return self.params

    def prompts(self, renderer: PromptRenderer) -> list[Prompt]:
        return [
            renderer.tokenize(given, self.input_path(index), self.add_special_tokens)
            if isinstance(given, str)
            else Prompt(given)
            for index, given in enumerate(self.inputs)
        ]

    def input_path(self, index: int) -> str:
        return f"input[{index}]" if self.is_list else "input"

    def answer(self, result: PoolingResult) -> Json:
        encode = _as_base64 if self.as_base64 else list
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(result.vectors)
        ]
        return result.response("embd", object="list", data=data)


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """Parses a body of /v1/embeddings. Raises RequestError."""
    given = read_body(EmbeddingBody, body)
    inputs = as_prompts(given.input)
    if len(inputs) > MOST_INPUTS:
        raise RequestError(
            f"input has {len(inputs)} items, more than {MOST_INPUTS}; send several requests", param="input"
        )
    return EmbeddingRequest(
        given.model,
        given.terms,
        inputs=inputs,
        is_list=inputs is given.input,
        params=PoolingParams(given.dimensions, given.normalize),
        as_base64=given.encoding_format == "base64",
        add_special_tokens=given.add_special_tokens,
    )


def _as_base64(vector: array[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
