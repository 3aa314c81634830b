"""schemathesis makes requests of our own OpenAPI page, good and bad ones: every answer is as the page says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.generation.meta import TestPhase
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve_app.ingress.deployment import api

# What a schema cannot say (two fields that exclude each other, lengths in tokens) is refused all the same.
BEYOND_SCHEMAS = [positive_data_acceptance]
# An answer without a limit may fill the context. The walk through fields makes dozens of such requests.
LIMITS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
}
# It would end the replicas that the other requests need; tests/serve_app/test_serve_deploy.py sends it.
schema = schemathesis.openapi.from_dict(api.openapi()).exclude(path="/v1/cluster/reload")


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """A connection for thousands of requests."""
    with requests.Session() as session:
        yield session


@schema.parametrize()
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_request_is_answered_as_the_page_says(case: Any, url: str, session: requests.Session) -> None:
    limits = LIMITS.get(case.operation.path, ())
    in_order = case.meta.phase.name is TestPhase.COVERAGE  # field by field; random requests stay as they are
    if limits and in_order and isinstance(case.body, dict) and not case.body.keys() & set(limits):
        case.body[limits[0]] = 3
    case.call_and_validate(base_url=url, session=session, excluded_checks=BEYOND_SCHEMAS, timeout=300)


def test_nothing_is_left_in_the_engine_after_them(idle: Callable[[], bool]) -> None:
    assert idle()
