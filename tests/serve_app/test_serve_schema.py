"""schemathesis makes requests of our own OpenAPI page, good and bad ones: every answer is as the page says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve_app.ingress.deployment import api

# What a schema cannot say (two fields that exclude each other, lengths in tokens) is refused all the same.
BEYOND_SCHEMAS = [positive_data_acceptance]
schema = schemathesis.openapi.from_dict(api.openapi())


@schema.parametrize()
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_request_is_answered_as_the_page_says(case: Any, url: str) -> None:
    case.call_and_validate(base_url=url, excluded_checks=BEYOND_SCHEMAS, timeout=300)


def test_nothing_is_left_in_the_engine_after_them(idle: Callable[[], bool]) -> None:
    assert idle()
