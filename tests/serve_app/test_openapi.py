"""The OpenAPI page: every route with its body's schema, which accepts what the route's parser does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from qwen3_dist.errors import EngineDeadError, RequestError
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.messages.answer import message_error
from serve_app.apis.messages.request import parse_count_tokens, parse_messages
from serve_app.apis.openapi import AnthropicError, OpenAIError
from serve_app.apis.rerank import parse_rerank, parse_score
from serve_app.apis.responses.request import parse_responses
from serve_app.apis.shared.errors import error_object
from serve_app.apis.tokens import parse_detokenize, parse_tokenize
from serve_app.ingress.deployment import api

USER = {"role": "user", "content": "hi"}
# A parser and a body that it takes, by path.
BODIES: dict[str, tuple[Callable[[bytes], Any], dict[str, Any]]] = {
    "/v1/chat/completions": (parse_chat, {"messages": [USER]}),
    "/v1/completions": (parse_completion, {"prompt": "hi"}),
    "/v1/responses": (parse_responses, {"input": [USER]}),
    "/v1/messages": (parse_messages, {"messages": [USER], "max_tokens": 5}),
    "/v1/messages/count_tokens": (parse_count_tokens, {"messages": [USER]}),
    "/v1/embeddings": (parse_embedding, {"input": "hi"}),
    "/v1/rerank": (parse_rerank, {"query": "hi", "documents": ["x"]}),
    "/v1/score": (parse_score, {"text_1": "hi", "text_2": ["x"]}),
    "/tokenize": (parse_tokenize, {"prompt": "hi"}),
    "/detokenize": (parse_detokenize, {"tokens": [5]}),
}
VALUES: list[Any] = [
    None,
    0,
    1,
    -1,
    0.5,
    7,
    10**20,
    "",
    "auto",
    "x",
    True,
    [],
    [1],
    ["x"],
    [[]],
    {},
    {"type": "text"},
    [{}],
]


def schema(path: str) -> dict[str, Any]:
    content = api.openapi()["paths"][path]["post"]["requestBody"]["content"]
    body: dict[str, Any] = content["application/json"]["schema"]
    return body


@pytest.mark.parametrize("path", BODIES)
def test_a_bodys_schema_says_what_its_parser_does(path: str) -> None:
    parse, body = BODIES[path]
    validator = jsonschema.Draft202012Validator(schema(path))
    validator.check_schema(schema(path))
    assert validator.is_valid(body) and parse(json.dumps(body).encode())
    for name in schema(path)["properties"]:
        for value in VALUES:
            changed = {**body, name: value}
            if validator.is_valid(changed):
                continue
            with pytest.raises(RequestError) as error:
                parse(json.dumps(changed).encode())
            assert (error.value.param or "").startswith(name), changed


@pytest.mark.parametrize("path", BODIES)
def test_every_field_is_described(path: str) -> None:
    assert all(field.get("description") for field in schema(path)["properties"].values())


def test_every_route_says_how_it_refuses() -> None:
    for path, routes in api.openapi()["paths"].items():
        for described in routes.values():
            assert described["summary"], path
            statuses = {"400", "401", "404", "405", "408", "413", "422", "429", "500", "503"}
            assert statuses < described["responses"].keys(), path


@pytest.mark.parametrize("error", [RequestError("x", param="y"), EngineDeadError("x"), KeyError("x")])
def test_errors_have_the_form_that_the_page_gives(error: Exception) -> None:
    assert OpenAIError.model_validate(error_object(error), strict=True, extra="forbid")
    assert AnthropicError.model_validate(message_error(error), strict=True, extra="forbid")
