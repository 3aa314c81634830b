"""`explain --measure`: real steps on real ranks, whose time is found by operation and set beside predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.calibration.measured_steps import JOINED, OUTSIDE, OWN, Compared, MeasuredStep, measure_steps
from cluster.hardware import as_dict
from cluster.planning.cost_model import CostModel, StepShape
from qwen3_dist import EngineConfig, Layout
from qwen3_dist.engine.engine import Engine
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.worker import step_profile
from qwen3_dist.worker.step_profile import Timeline
from serve_app.cli import main
from tests.checkpoints import write_checkpoint
from tests.cluster.machines import DENSE, PLAIN, cluster

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def tokens(engine: Engine) -> list[int]:
    engine.add_request("one", [5, 6, 7], GREEDY)
    found: list[int] = []
    while engine.has_work:
        for deltas in engine.step().values():
            found += [token for delta in deltas for token in delta.token_ids]
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that a test moves on by itself."""
    now = [0.0]
    monkeypatch.setattr(step_profile.time, "perf_counter", lambda: now[0])
    yield now


def nested(timeline: Timeline, now: list[float]) -> None:
    def inner() -> None:
        now[0] += 2.0

    def outer() -> None:
        now[0] += 1.0
        timeline.timed("inner", inner)()
        now[0] += 4.0

    timeline.timed("outer", outer)()
    now[0] += 100.0  # nothing is timed
    timeline.timed("outer", outer)()


def test_time_counts_for_the_innermost_call(clock: list[float]) -> None:
    timeline = Timeline(torch.device("cpu"))
    nested(timeline, clock)
    assert timeline.seconds() == {"outer": 10.0, "inner": 4.0}


def test_on_a_gpu_time_is_that_between_events_of_the_stream(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's stream is a second behind the host; reading waits for it."""
    waited: list[bool] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = 1e3 * clock[0] + 1e3

        def elapsed_time(self, other: Event) -> float:
            assert waited, "the event may not have happened yet"
            return other.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(True))
    timeline = Timeline(torch.device("cuda"))
    nested(timeline, clock)
    assert timeline.seconds() == {"outer": 10.0, "inner": 4.0}


@pytest.mark.parametrize("moe", [False, True])
def test_a_profile_changes_no_token_and_leaves_nothing_behind(tmp_path: Path, moe: bool) -> None:
    path = write_checkpoint(tmp_path, moe=moe)
    engine = Engine(EngineConfig(str(path), device="cpu", num_blocks=32, executor="in_process"))
    try:
        runner: Any = engine._executor._runner  # type: ignore[attr-defined]
        owners = [runner, runner.model, runner.model.ops, *runner.model.modules(), *runner.model.blocks]
        before = [dict(vars(owner)) for owner in owners]
        expected = tokens(engine)
        for apart in (False, True):
            engine.paces.start_profile(apart)
            assert tokens(engine) == expected
            ((steps, operations),) = engine.paces.end_profile()
            assert steps == 6 and all(seconds > 0 for seconds in operations.values())
            kernels = {"attention projections", *(("router", "experts") if moe else ("dense FFN",))}
            assert (kernels < set(operations) and "fused kernels" not in operations) or not apart
        after = [dict(vars(owner)) for owner in owners]
        skipped = ("own_time", "_profile", "_state")
        for old, new in zip(before, after, strict=True):
            assert {k: v for k, v in old.items() if k not in skipped}.keys() == {
                k: v for k, v in new.items() if k not in skipped
            }.keys()
            assert all(
                new[name] is old[name] for name in ("attend", "transform", "whole_stage") if name in old
            )
    finally:
        engine.shutdown()


def test_steps_of_real_ranks_are_measured_and_set_beside_predictions(
    nursery: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = cluster(num_devices=2, devices_per_node=2, shared_host=True, step_overhead_s=1e-3)
    (tmp_path / "hardware.yaml").write_text(yaml.safe_dump(as_dict(machine)))
    load = ("--input-len", "24", "--output-len", "16", "--concurrency", "2")
    asked = (
        "explain",
        "bundled",
        "--layout",
        "tp=2,ep=2",
        "--cluster",
        str(tmp_path / "hardware.yaml"),
        *load,
    )
    assert main([*asked, "--measure", "--json"]) == 0
    decode, prompt = json.loads(capsys.readouterr().out)["measured"]
    assert (decode["shape"]["num_decodes"], prompt["shape"]["prefill_tokens"]) == (2, 24)
    for step in (decode, prompt):
        operations = step["operations"]
        known = {"tp all-reduce", "attention projections", "dense FFN", "experts", "router", "head", OWN}
        assert known < {name for name, pair in operations.items() if pair["measured_ms"]}
        assert all(operations[name]["predicted_ms"] for name in known)
        attention = f"attention of {step['kind']}s"
        assert operations[attention]["measured_ms"] and operations[attention]["predicted_ms"]
        measured = sum(pair["measured_ms"] or 0 for pair in operations.values())
        assert measured == pytest.approx(step["measured_ms"], abs=0.01)
        predicted = sum(pair["predicted_ms"] or 0 for pair in operations.values())
        assert predicted == pytest.approx(step["predicted_ms"], abs=0.01)


def test_pipeline_stages_are_summed(nursery: None, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=False)
    settings = {"num_blocks": 64, "executor": "processes"}
    config = EngineConfig(str(path), device="cpu", layout=Layout(pp=2), **settings)  # type: ignore[arg-type]
    decode, prompt = measure_steps(config, 2, 30, 16)
    assert {"stage send", "pipeline", "embedding", "head"} < set(decode.operations) & set(prompt.operations)
    assert decode.shape.num_decodes == 2 and decode.seconds > 0


def test_overheads_of_steps_and_layers_stand_beside_the_ranks_own() -> None:
    shape = StepShape(2, 60, 0, 0, 2)
    model = CostModel(DENSE, Layout(), cluster(step_overhead_s=1.0, layer_overhead_s=0.5))
    measured = MeasuredStep("decode", shape, 9.0, 7.0, {"head": 5.0, OWN: 3.0, "sampling": 1.0})
    found = Compared.of(measured, model)
    assert found.operations[OWN] == (3.0, pytest.approx(2.0))
    assert found.operations["sampling"] == (1.0, None) and found.operations["head"][0] == 5.0
    assert found.operations["dense FFN"] == (None, pytest.approx(model.step_parts(shape)["dense FFN"]))
    assert found.operations[JOINED] == (-2.0, None) and found.operations[OUTSIDE] == (2.0, None)


def test_another_machine_cannot_be_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--input-len", "24", "--output-len", "16", "--concurrency", "2")
    assert main(["explain", "--layout", "tp=1", "--gpus", "1xH100", *load, "--measure"]) == 2
    shown = capsys.readouterr()
    assert "--measure runs steps on this machine, a cpu device" in shown.err and shown.out == ""
    assert PLAIN.device_kind == "cuda"
