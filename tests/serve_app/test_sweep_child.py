"""`sweep --http`: what one layout's service is given, and what is made of the client's figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.sweep.run import SweepPoint, SweepWorkload
from qwen3_dist.errors import ResourceError
from qwen3_dist.layout import Layout
from serve_app.cli import main
from serve_app.load_client import sweep_child
from serve_app.settings import ServiceConfig
from tests.serve_app.fake_openai import FakeOpenAI, fake_openai

POINTS = (SweepPoint(4, 20, 6), SweepPoint(3, 10, 1, rate=100.0))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    """A service whose answers are known in place of the one that would be started; `started` has its settings."""
    with fake_openai() as service:
        service.started = []  # type: ignore[attr-defined]

        @contextlib.contextmanager
        def running(config: ServiceConfig, ray_address: str | None) -> Iterator[Any]:
            service.started.append((config, ray_address))  # type: ignore[attr-defined]
            yield SimpleNamespace(url=service.url)

        monkeypatch.setattr(sweep_child, "running_service", running)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield service


def job(**workload: Any) -> dict[str, Any]:
    settings = asdict(SweepWorkload(POINTS, device="cpu", **workload))
    return {
        "layout": "tp=2",
        "model": "",
        "random_weights": False,
        "ray_address": "auto",
        "workload": settings,
    }


def test_each_repeat_of_each_point_is_sent_at_its_rate(fake: FakeOpenAI) -> None:
    found = sweep_child.run(job(repeats=2))
    assert [point["point"] for point in found["points"]] == ["4×(20→6)", "3×(10→1) at 100/s"]
    for point, sent in zip(found["points"], POINTS, strict=True):
        assert len(point["repeats"]) == 2
        for figures in point["repeats"]:
            assert (figures["completed"], figures["failed"]) == (sent.num_prompts, 0)
            assert 0 < figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["p90"] <= figures["ttft_ms"]["p99"]
            assert (figures["itl_ms"] is None) == (sent.output_len == 1)
            assert figures["output_tokens_per_s"] > 0
    prompts = [body["prompt"] for body in fake.bodies]
    assert len(prompts) == len(set(prompts)) == 2 * (4 + 3) + 4  # a warm-up before each run
    ((config, address),) = fake.started  # type: ignore[attr-defined]
    engine = config.models[0].replica.engine
    assert (engine.layout, engine.device, engine.prefix_caching, address) == (
        Layout(tp=2),
        "cpu",
        False,
        "auto",
    )
    assert engine.max_model_len >= 26


def test_a_service_that_answers_nothing_has_failed(fake: FakeOpenAI) -> None:
    fake.failing = set(range(1, 5))
    with pytest.raises(ResourceError, match=r"no request of 4×\(20→6\) was answered: HTTP 500"):
        sweep_child.run(job())


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.yaml").write_text("points: [{num_prompts: 1, input_len: 4, output_len: 1}]\n")
    asked = ("sweep", "Qwen3-0.6B", "--layouts", "tp=1", "--workload", str(tmp_path / "w.yaml"), "--http")
    assert main([*asked, "--out", str(tmp_path / "out")]) == 2
    assert "--http needs a checkpoint with a tokenizer" in capsys.readouterr().err
