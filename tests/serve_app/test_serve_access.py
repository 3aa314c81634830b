"""Keys, their limits, and requests of web pages, on a real server: a second service beside the shared one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from cluster.ray_private import serve_client
from serve_app.app import build_app
from serve_app.settings.keys import hash_of
from tests.serve_app.support import SETTINGS, error_of, wait_for

NAME, PAGE = "access", "https://page.example"
COMPLETIONS, REBALANCE = "/v1/completions", "/v1/cluster/experts/rebalance"
SHORT: dict[str, Any] = {"prompt": "hi", "max_tokens": 2, "ignore_eos": True}
# With two sequences at a time in the engine, tens of thousands of steps.
ENDLESS: dict[str, Any] = {**SHORT, "max_tokens": 900, "n": 64, "stream": True}
KEYS: tuple[dict[str, Any], ...] = (
    {"name": "alice"},
    {"name": "ops", "admin": True},
    {"name": "rare", "requests_per_minute": 1},
    {"name": "single", "max_concurrent_requests": 1},
    {"name": "short", "tokens_per_minute": 1},
    {"name": "streaming", "tokens_per_minute": 1},
)


def key_of(name: str) -> str:
    return f"the key of {name}"


def write(file: Path, *names: str) -> None:
    """Writes a keys file, which is JSON here: YAML that every client library can write."""
    keys = [
        {**key, "key": hash_of(key_of(key["name"]))} for key in (*KEYS, *({"name": name} for name in names))
    ]
    file.write_text(json.dumps({"keys": keys}))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    write(file)
    return file


@pytest.fixture(scope="module")
def address(url: str, keys_file: Path) -> Iterator[str]:
    settings = {
        **SETTINGS,
        "model_name": NAME,
        "layout": "tp=1",
        "cpus_per_rank": 0.05,
        "max_replicas": 1,
        "max_num_seqs": 2,
        "keys_file": str(keys_file),
        "admin_key": "the admin's key",
        "cors_allow_origins": PAGE,
    }
    serve.run(build_app(settings), name=NAME, route_prefix=f"/{NAME}")
    try:
        yield f"{url}/{NAME}"
    finally:
        serve.delete(NAME)


def ask(address: str, name: str, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key_of(name)}"}
    return httpx.post(address + path, json={**SHORT, **fields}, headers=headers, timeout=60)


def wait_for_part(lines: Iterator[str]) -> None:
    """Reads a stream up to its next part, past pings."""
    assert any(line.startswith("data: {") for line in lines)


def test_keys_of_the_file_are_let_in_and_admin_routes_need_an_admin_key(address: str) -> None:
    assert ask(address, "alice").status_code == 200
    error_of(ask(address, "nobody"), 401)
    error_of(httpx.post(address + COMPLETIONS, json=SHORT, timeout=60), 401)
    assert "'alice'" in error_of(ask(address, "alice", REBALANCE), 403)["message"]
    assert ask(address, "ops", REBALANCE).status_code == 200
    admin = {"x-api-key": "the admin's key"}
    assert httpx.post(address + REBALANCE, headers=admin, timeout=60).status_code == 200


def test_a_hash_lets_nobody_in_and_serves_status_shows_no_key(address: str) -> None:
    headers = {"x-api-key": hash_of("the admin's key")}
    error_of(httpx.post(address + COMPLETIONS, json=SHORT, headers=headers, timeout=60), 401)
    status = json.dumps(serve_client().get_serve_details(), default=str)
    assert hash_of("the admin's key") in status and "the admin's key" not in status


def test_a_changed_keys_file_is_taken_up_and_a_broken_one_is_not(address: str, keys_file: Path) -> None:
    error_of(ask(address, "newcomer"), 401)
    write(keys_file, "newcomer")
    wait_for(lambda: ask(address, "newcomer").status_code == 200)
    keys_file.write_text("keys: [")
    assert ask(address, "newcomer").status_code == 200
    write(keys_file)
    wait_for(lambda: ask(address, "newcomer").status_code == 401)
    assert ask(address, "alice").status_code == 200


def test_a_key_beyond_its_requests_per_minute_is_429_and_others_are_not(address: str) -> None:
    assert ask(address, "rare").status_code == 200
    refused = ask(address, "rare")
    assert "'rare' may use 1 requests per minute" in error_of(refused, 429)["message"]
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert ask(address, "alice").status_code == 200


def test_a_key_runs_no_more_requests_at_once_than_it_may(address: str) -> None:
    headers = {"authorization": f"Bearer {key_of('single')}"}
    with httpx.stream("POST", address + COMPLETIONS, json=ENDLESS, headers=headers, timeout=60) as running:
        wait_for_part(lines := running.iter_lines())  # dropping them would hang up
        assert "may run 1 requests at once" in error_of(ask(address, "single"), 429)["message"]
        wait_for_part(lines)
    wait_for(lambda: ask(address, "single").status_code == 200)


def test_a_key_pays_for_the_tokens_of_its_answers(address: str) -> None:
    used = ask(address, "short", max_tokens=100).json()["usage"]["total_tokens"]
    assert used > 100
    refused = ask(address, "short")
    assert "1 tokens per minute" in error_of(refused, 429)["message"]
    assert (used - 10) * 60 < int(refused.headers["retry-after"]) <= used * 60  # ten minutes may have passed


def test_a_stream_that_its_client_drops_is_paid_as_far_as_it_was_sent(address: str) -> None:
    headers = {"authorization": f"Bearer {key_of('streaming')}"}
    with httpx.stream("POST", address + COMPLETIONS, json=ENDLESS, headers=headers, timeout=60) as running:
        wait_for_part(running.iter_lines())
    refused = ask(address, "streaming")
    error_of(refused, 429)
    assert 60 < int(refused.headers["retry-after"]) <= 64 * 901 * 60


def test_pages_of_an_allowed_origin_may_ask_and_read(address: str) -> None:
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    told = httpx.options(address + COMPLETIONS, headers={"origin": PAGE, **wish}, timeout=60)
    assert (told.status_code, told.headers["access-control-allow-origin"]) == (204, PAGE)
    headers = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    refused = httpx.post(address + COMPLETIONS, json=SHORT, headers=headers, timeout=60)
    error_of(refused, 401)
    assert refused.headers["access-control-allow-origin"] == PAGE
    headers["authorization"] = f"Bearer {key_of('alice')}"
    answer = httpx.post(address + COMPLETIONS, json=SHORT, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)


def test_pages_of_other_sites_cannot_post_to_the_service_without_keys(http: httpx.Client) -> None:
    """As a form or a script can without a preflight request, and as a page whose name was rebound does."""
    for headers in (
        {"origin": PAGE},
        {"origin": PAGE, "sec-fetch-site": "cross-site"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ):
        refused = http.post(COMPLETIONS, json=SHORT, headers=headers)
        error_of(refused, 403)
        assert "access-control-allow-origin" not in refused.headers
        plain = {**headers, "content-type": "text/plain"}
        error_of(http.post(COMPLETIONS, content=json.dumps(SHORT), headers=plain), 403)
    rebound = {
        "host": "page.example:8000",
        "origin": "http://page.example:8000",
        "sec-fetch-site": "same-origin",
    }
    assert (
        "--allowed-hosts page.example"
        in error_of(http.post(COMPLETIONS, json=SHORT, headers=rebound), 403)["message"]
    )
    error_of(http.get("/v1/models", headers=rebound), 403)
    own = {"origin": str(http.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
    assert http.post(COMPLETIONS, json=SHORT, headers=own).status_code == 200
