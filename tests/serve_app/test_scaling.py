"""How many replicas a load asks for, and what a replica reports of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from serve_app.metrics.requests import RequestMetrics
from serve_app.replica.load import shares_of_targets
from serve_app.scaling import KV_USAGE, TOKENS, TTFT, load_policy, replicas_wanted
from serve_app.settings import LiveSettings, LoadTargets, read_service_config
from serve_app.settings.options import model_options


def wanted(name: str, *shares: float, running: int | None = None) -> float:
    return replicas_wanted({name: shares}, len(shares) if running is None else running)


def test_tokens_and_kv_use_ask_for_what_brings_them_to_their_target() -> None:
    assert wanted(TOKENS, 3.0) == 3
    assert wanted(TOKENS, 2.0, 0.5) == 2.5
    assert wanted(TOKENS, 0.0, 0.0) == 0
    assert wanted(KV_USAGE, 1.0, 1.0) == 2
    assert wanted(KV_USAGE, 3.0, running=2) == 3  # the second one has not reported yet


def test_a_high_ttft_adds_replicas_and_one_near_its_target_keeps_them() -> None:
    assert wanted(TTFT, 1.5, 1.5) == 3
    assert wanted(TTFT, 50.0, 50.0) == 4  # at most twice as many
    assert wanted(TTFT, 1.0, 1.0) == wanted(TTFT, 0.5, 0.5) == 2
    assert wanted(TTFT, 0.45, 0.45) == wanted(TTFT, 0.0, 0.0) == 0
    assert wanted(TTFT, 3.0, 0.0) == 3  # the mean of the replicas


def test_the_highest_of_the_loads_decides() -> None:
    assert replicas_wanted({TOKENS: [2.0], KV_USAGE: [1.0], TTFT: [0.0]}, 1) == 2
    assert replicas_wanted({TOKENS: [1.0], KV_USAGE: [3.0], TTFT: [2.0]}, 1) == 3
    assert replicas_wanted({TOKENS: [1.0], KV_USAGE: [1.0], TTFT: [2.0]}, 1) == 2
    assert replicas_wanted({}, 3) == 0


def context(requests: float, running: int, **shares: float) -> Any:
    """What Serve gives the policy of a model that aims for ten requests a replica."""
    return SimpleNamespace(
        current_num_replicas=running,
        target_num_replicas=running,
        total_num_requests=requests,
        policy_state={},
        config=AutoscalingConfig(target_ongoing_requests=10, max_replicas=9, min_replicas=0),
        aggregated_metrics={name: {f"r{r}": share for r in range(running)} for name, share in shares.items()},
    )


def test_the_policy_asks_for_no_fewer_replicas_than_the_requests_need() -> None:
    assert load_policy(context(40, 2, share_of_tokens=3))[0] == 6
    assert load_policy(context(40, 2, share_of_tokens=0))[0] == load_policy(context(40, 2))[0] == 4
    assert load_policy(context(0, 1, share_of_tokens=0))[0] == 0  # it may sleep
    assert load_policy(context(0, 0))[0] == 0
    assert load_policy(context(1, 0))[0] == 1  # and wakes


def test_targets_change_what_replicas_report_and_never_serves_policy() -> None:
    def options(**args: object) -> dict[str, Any]:
        config = read_service_config({"max_replicas": 2, **args})
        return model_options(config, config.models[0])

    targets = {"target_tokens": 5000, "target_kv_usage": 0.8, "target_ttft_s": 2}
    plain, aimed = options(), options(**targets)
    assert plain["autoscaling_config"] == aimed["autoscaling_config"]
    policy = AutoscalingConfig(**plain["autoscaling_config"]).policy.get_policy()
    assert policy(context(0, 1, share_of_tokens=4))[0] == 4
    assert read_settings(LiveSettings, plain["user_config"]).targets == LoadTargets()
    assert read_settings(LiveSettings, aimed["user_config"]).targets == LoadTargets(5000, 0.8, 2.0)


def test_only_recent_first_tokens_count_and_nine_of_ten_are_within(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve_app.metrics.requests.time.monotonic", lambda: now)
    metrics = RequestMetrics()
    assert metrics.recent_ttft_s(10.0) == 0.0
    watch = metrics.watch(arrival_s=99.0, prompt_tokens=3, n=1)
    watch.generated([TokenDelta(0, (1,), scheduled_s=99.5, step_s=99.9)])
    watch.generated([TokenDelta(0, (1,), scheduled_s=99.5, step_s=99.95)])
    assert metrics.recent_ttft_s(10.0) == 1.0
    for ttft_s in range(11):
        metrics.count_first_token(float(ttft_s))
    assert 8.0 < metrics.recent_ttft_s(10.0) <= 9.0
    now = 111.0
    assert metrics.recent_ttft_s(10.0) == 0.0


def test_a_replica_reports_shares_of_its_targets() -> None:
    engine = AsyncEngine(
        EngineConfig(device="cpu", dtype="float32", num_blocks=8, block_size=16, max_num_seqs=1)
    )

    async def reports() -> list[dict[str, float]]:
        metrics = RequestMetrics()

        def report(**targets: Any) -> dict[str, float]:
            return shares_of_targets(LoadTargets(**targets), engine, metrics)

        idle = report(tokens=10, kv_usage=0.5, ttft_s=2.0)
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        first = engine.generate([5] * 40, params, "first")
        await anext(first)
        second = engine.generate([7] * 30, params, "second", announce=True)
        await anext(second)
        while not engine.stats().num_waiting:
            await asyncio.sleep(0)
        busy = report(tokens=10, kv_usage=0.5, ttft_s=2.0)
        metrics.count_first_token(500.0)
        late = report(ttft_s=2.0)
        await first.aclose()
        await second.aclose()
        return [idle, busy, late]

    try:
        idle, busy, late = asyncio.run(reports())
    finally:
        engine.shutdown()
    assert idle == {TOKENS: 0, KV_USAGE: 0, TTFT: 0}
    assert 30 + 41 <= busy[TOKENS] * 10 <= 30 + 100
    assert 3 / 8 + 30 / 128 <= busy[KV_USAGE] * 0.5 <= 7 / 8 + 30 / 128
    assert busy[TTFT] > 0 and late == {TTFT: 250.0}
