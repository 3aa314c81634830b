"""The list of models, in the form that the client's API has."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic.types import ModelInfo
from fastapi import Request
from openai.types import Model as OpenAIModel

from qwen3_dist.errors import RequestError
from serve_app.apis.models import Model, Models
from serve_app.ingress.deployment import Ingress

NAMES = ("base", "one", "two")
MODELS = Models(
    (Model("base", None, 4096), Model("one", "base", 4096), Model("two", "base", 4096)), 1_700_000_000
)


def ids(**query: str) -> tuple[list[str], bool]:
    page = MODELS.anthropic_list(query)
    names = [model["id"] for model in page["data"]]
    assert (page["first_id"], page["last_id"]) == ((names[0], names[-1]) if names else (None, None))
    return names, page["has_more"]


def test_openais_clients_see_its_objects_and_the_model_of_an_adapter() -> None:
    listed = MODELS.openai_list()
    assert listed["object"] == "list"
    models = [OpenAIModel.model_validate(model) for model in listed["data"]]
    assert [(model.id, model.object, model.created) for model in models] == [
        (name, "model", 1_700_000_000) for name in NAMES
    ]
    assert [model["parent"] for model in listed["data"]] == [None, "base", "base"]


def test_anthropics_clients_see_its_objects() -> None:
    (first, *_) = MODELS.anthropic_list({})["data"]
    model = ModelInfo.model_validate(first)
    assert (model.type, model.display_name, model.max_input_tokens) == ("model", "base", 4096)
    assert first["created_at"] == "2023-11-14T22:13:20Z"


def test_anthropics_list_comes_in_pages() -> None:
    assert ids() == (["base", "one", "two"], False)
    assert ids(limit="2") == (["base", "one"], True)
    assert ids(limit="2", after_id="one") == (["two"], False)
    assert ids(before_id="two", limit="1") == (["one"], True)
    assert ids(after_id="two") == ([], False)


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1"])
def test_a_page_of_no_size_is_refused(limit: str) -> None:
    with pytest.raises(RequestError, match="from 1 to 1000"):
        ids(limit=limit)


@pytest.mark.parametrize("path", ["one", "one/"])
def test_a_models_path_may_end_with_a_slash(path: str) -> None:
    async def models() -> Models:
        return MODELS

    ingress: Any = SimpleNamespace(_models=models)
    answer = asyncio.run(Ingress.model(ingress, path, Request({"type": "http", "headers": []})))
    assert json.loads(bytes(answer.body))["id"] == "one"


@pytest.mark.parametrize("where", ["after_id", "before_id"])
def test_a_page_beside_a_model_that_is_not_listed_is_refused(where: str) -> None:
    with pytest.raises(RequestError, match="must be the id of a listed model, not 'three'") as refused:
        ids(**{where: "three"})
    assert refused.value.param == where


def test_a_page_lies_between_two_models() -> None:
    assert ids(after_id="base", before_id="two") == (["one"], False)
    assert ids(after_id="two", before_id="one") == ([], False)
    assert ids(before_id="base") == ([], False)


@pytest.mark.parametrize("name", ["", "three"])
def test_no_other_model_is_served(name: Any) -> None:
    with pytest.raises(RequestError, match="use 'base' or 'one' or 'two'") as refused:
        MODELS.openai_model(name)
    assert (refused.value.status, refused.value.param) == (404, "model")
