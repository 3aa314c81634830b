"""What an operator sees at /v1/cluster, /ready and /health, also while a rank hangs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import threading

import httpx
import pytest

from serve_app.cli import main
from tests.serve_app.support import wait_for


def test_the_cluster_shows_models_replicas_ranks_and_load(http: httpx.Client, model: str) -> None:
    before = http.get("/v1/cluster").json()["models"][0]["replicas"][0]["load"]
    answered = http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3, "ignore_eos": True})
    assert answered.is_success
    view = http.get("/v1/cluster").json()
    [served] = view["models"]
    assert view["object"] == "cluster" and view["uptime_s"] > 0
    assert (served["id"], served["status"], served["message"]) == (model, "ready", "")
    assert served["min_replicas"] == 1 and served["max_replicas"] == 2
    replica = served["replicas"][0]
    assert replica["healthy"] and replica["layout"] == "tp=2,ep=2"
    assert [rank["rank"] for rank in replica["ranks"]] == [0, 1]
    assert all(rank["memory_bytes"] > 2**20 for rank in replica["ranks"])
    slowest, own_s = replica["slowest_rank"], [rank["own_step_s"] for rank in replica["ranks"]]
    assert own_s[slowest["rank"]] == max(own_s) > 0 and slowest["excess"] >= 0
    load = replica["load"]
    assert load["generation_tokens"] - before["generation_tokens"] == 3
    assert 0 <= load["kv_cache_usage"] <= 1 and load["num_requests_running"] == 0


def test_a_rank_that_hangs_is_told_at_once_and_replaced_and_its_requests_go_on(
    http: httpx.Client, model: str
) -> None:
    wait_for(lambda: len(http.get("/v1/cluster").json()["models"][0]["replicas"]) == 1)
    [replica] = http.get("/v1/cluster").json()["models"][0]["replicas"]
    body = {"model": model, "prompt": "hi", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    expected = http.post("/v1/completions", json=body)  # from which the engine knows its steps
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(http.post("/v1/completions", json=body, timeout=90))
    )
    before = [rank["pid"] for rank in replica["ranks"]]
    os.kill(before[1], signal.SIGSTOP)
    asking.start()
    wait_for(lambda: http.get("/ready").status_code == 503)
    wait_for(lambda: http.get("/ready").is_success and http.get("/health").is_success, timeout_s=60)
    asking.join(timeout=90)
    assert answers and answers[0].json()["choices"] == expected.json()["choices"]
    [after] = http.get("/v1/cluster").json()["models"][0]["replicas"]
    assert after["id"] == replica["id"] and after["healthy"]
    assert [rank["pid"] for rank in after["ranks"]][0] == before[0]
    recovery = after["recoveries"][-1]
    assert recovery["ranks"] == [1] and recovery["bytes_read"] > 0
    assert re.search(r"rank_replacements_total\{.*\} 1\.0\n", http.get("/metrics").text)


def test_top_shows_the_live_service(url: str, model: str, http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3}).is_success
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["top", url, "--once"]) == 0
    first, second, heading, replica, slowest, *_, last = out.getvalue().splitlines()
    assert re.fullmatch(r"\s+slowest rank [01] \(\+\d+%\)", slowest)
    assert "sequences in flight" in first and second.startswith(f"{model}: ready, ")
    assert "KV" in heading and "tp=2,ep=2" in replica
    assert last.startswith("busiest experts, times the mean: layer ")


def test_top_of_what_is_no_service_says_so(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", f"{url}/nothing"]) == 2
    assert "answers 404 for /v1/cluster" in capsys.readouterr().err
    assert main(["top", "http://127.0.0.1:9"]) == 2
    assert "no service answers at http://127.0.0.1:9" in capsys.readouterr().err
