"""What the load generator computes: arrival times, lengths, prompts, timed streams, figures."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.arrival_times import arrival_times
from qwen3_dist.errors import ConfigError
from qwen3_dist.weights.source import bundled_path
from serve_app.load_client import datasets
from serve_app.load_client.client import Outcome, read_stream
from serve_app.load_client.datasets import Shape, random_shapes, read_trace, read_turns, sharegpt_shapes
from serve_app.load_client.prompts import FileTokens, PromptMaker
from serve_app.load_client.report import METRICS, figures, report_lines
from serve_app.load_client.run import run_load


def test_an_infinite_rate_sends_all_at_once_and_even_arrivals_are_evenly_spaced() -> None:
    assert arrival_times(3, math.inf, 1.0, seed=0) == [0.0, 0.0, 0.0]
    assert arrival_times(4, 2.0, math.inf, seed=0) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed_and_the_last_arrival_is_when_the_rate_says(burstiness: float) -> None:
    times = arrival_times(20_000, 50.0, burstiness, seed=3)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert times[-1] == pytest.approx(400.0) and min(gaps) >= 0
    spread = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.05)  # the gamma distribution's
    assert times == arrival_times(20_000, 50.0, burstiness, seed=3)
    assert times != arrival_times(20_000, 50.0, burstiness, seed=4)


def test_random_lengths_fill_their_range_and_the_prefix_comes_on_top() -> None:
    assert random_shapes(2, 10, 3, 0.0, 0, seed=0) == [Shape(10, 3), Shape(10, 3)]
    shapes = random_shapes(2000, 10, 3, 0.5, 7, seed=0)
    assert {shape.input_len for shape in shapes} == set(range(7 + 5, 7 + 15 + 1))
    assert {shape.output_len for shape in shapes} == {1, 2, 3, 4, 5}
    assert {shape.prefix_len for shape in shapes} == {7}
    assert min(shape.output_len for shape in random_shapes(100, 10, 1, 0.9, 0, seed=0)) == 1


def test_sharegpt_shaped_lengths_are_lognormal_within_vllms_limits() -> None:
    shapes = sharegpt_shapes(20_000, seed=0)
    assert all(datasets.within_limits(shape.input_len, shape.output_len) for shape in shapes)
    # A lognormal distribution's median is its mean over sqrt(1 + cv^2).
    inputs, outputs = (
        statistics.median(getattr(shape, name) for shape in shapes) for name in ("input_len", "output_len")
    )
    assert inputs == pytest.approx(161 / math.sqrt(2), rel=0.05)
    assert outputs == pytest.approx(338 / math.sqrt(2), rel=0.05)


def test_a_sharegpt_file_gives_first_turns_in_an_order_of_the_seed(tmp_path: Path) -> None:
    def said(*values: Any) -> dict[str, Any]:
        return {"id": "x", "conversations": [{"from": "human", "value": value} for value in values]}

    good = [said(f"question {number}", f"answer {number}", "more") for number in range(20)]
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([*good, said("alone"), said("q", None), {"id": "y"}, "text"]))
    turns = read_turns(file, seed=1)
    assert sorted(turns) == sorted((f"question {number}", f"answer {number}") for number in range(20))
    assert turns == read_turns(file, seed=1) != read_turns(file, seed=2)


def test_a_trace_is_read_with_times_from_its_first_request(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 27_000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1], "session": "a"},
        {"timestamp": 30_000, "input_length": 5, "output_length": 1},
        {"timestamp": 30_000, "input_length": 5, "output_length": 1},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_trace(file, speedup=2.0, most=2)
    assert first == Shape(6758, 500, hash_ids=(0, 1), arrival_s=0.0)
    assert second == Shape(5, 1, arrival_s=1.5)
    azure = [
        {"timestamp": f"2023-11-16 18:15:{second}0", "input_length": 5, "output_length": 1}
        for second in ("46.680590", "50.930590")
    ]
    file.write_text("\n".join(map(json.dumps, azure)))
    assert [shape.arrival_s for shape in read_trace(file, speedup=1.0)] == pytest.approx([0.0, 4.25])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"timestamp": 5,', "trace.jsonl:2: not JSON"),
        ("[5]", "trace.jsonl:2: expected a JSON object"),
        ('{"input_length": 5, "output_length": 1}', "trace.jsonl:2: timestamp must be"),
        ('{"timestamp": "noon", "input_length": 5, "output_length": 1}', "not 'noon'"),
        ('{"timestamp": 5, "input_length": 0, "output_length": 1}', "input_length must be a whole number"),
        ('{"timestamp": 5, "input_length": 5, "output_length": true}', "output_length must be a whole"),
        ('{"timestamp": 5, "input_length": 5, "output_length": 1, "hash_ids": "a"}', "hash_ids must be"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "timestamp goes back in time"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 2, "input_length": 5, "output_length": 1}\n' + line)
    with pytest.raises(ConfigError, match=words):
        read_trace(file, 1.0)


def test_prompts_have_exactly_the_tokens_asked_for_and_share_only_their_prefix() -> None:
    async def check() -> None:
        tokens = FileTokens(bundled_path())
        maker = await PromptMaker.create(tokens, seed=0)
        shapes = [Shape(length, 1) for length in (1, 2, 3, 17, 200, 1500)]
        samples = await maker.samples(shapes)
        lengths = [len(await tokens.encode(sample.prompt)) for sample in samples]
        assert lengths == [sample.input_len for sample in samples] == [1, 2, 3, 17, 200, 1500]
        assert samples == await (await PromptMaker.create(tokens, seed=0)).samples(shapes)
        assert samples != await (await PromptMaker.create(tokens, seed=1)).samples(shapes)
        one, other = await maker.samples([Shape(60, 1, prefix_len=40)] * 2)
        ids = [await tokens.encode(sample.prompt) for sample in (one, other)]
        assert ids[0][:40] == ids[1][:40] and len(ids[0]) == len(ids[1]) == 60
        assert ids[0][40:] != ids[1][40:]

    asyncio.run(check())


def test_blocks_of_a_trace_with_one_hash_are_one_text() -> None:
    async def check() -> None:
        tokens = FileTokens(bundled_path() / "tokenizer.json")
        maker = await PromptMaker.create(tokens, seed=0)
        shapes = [Shape(1100, 1, hash_ids=ids) for ids in ((7, 8, 9), (7, 6, 9), (5, 8, 9))]
        one, other, third = [await tokens.encode(sample.prompt) for sample in await maker.samples(shapes)]
        alike = next(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        assert alike == pytest.approx(datasets.HASH_BLOCK, rel=0.1)
        assert one[:4] != third[:4]

    asyncio.run(check())


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer takes a tokenizer.json or its directory"):
        FileTokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a usable tokenizer"):
        FileTokens(tmp_path)


class Pieces:
    """A body that arrives in the given reads."""

    def __init__(self, *reads: bytes) -> None:
        self._reads = reads

    async def iter_any(self) -> AsyncIterator[bytes]:
        for read in self._reads:
            yield read


def part(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def choice(**fields: Any) -> bytes:
    return part(choices=[{"index": 0, "finish_reason": None, **fields}])


def outcome_of(*reads: bytes) -> Outcome:
    """The stream's outcome by a clock that says 10, 11, 12 at its reads; the request was sent at 8."""
    outcome = Outcome(started=8.0, input_tokens=5)
    clock = itertools.count(10)
    asyncio.run(read_stream(Pieces(*reads), outcome, lambda: float(next(clock))))
    return outcome


def test_a_stream_is_timed_by_its_reads_and_counted_by_its_usage() -> None:
    text = choice(text="a") + choice(text="b")
    usage = part(choices=[], usage={"prompt_tokens": 6, "completion_tokens": 9}) + b"data: [DONE]\n\n"
    cut = len(text) - 20
    outcome = outcome_of(b": ping\n\n", text[:cut], text[cut:], choice(text=""), usage)
    assert (outcome.ttft, outcome.itl, outcome.latency) == (3.0, [1.0, 1.0], 5.0)  # ping, a, b, "", usage
    assert (outcome.input_tokens, outcome.output_tokens, outcome.error) == (6, 9, "")


def test_a_part_that_only_says_who_speaks_is_not_the_first_token() -> None:
    role = choice(delta={"role": "assistant", "content": ""})
    usage = part(choices=[], usage={"completion_tokens": 2})
    outcome = outcome_of(role, choice(delta={"reasoning": "so"}), choice(delta={"content": "yes"}), usage)
    assert (outcome.ttft, outcome.itl, outcome.latency) == (3.0, [1.0], 4.0)
    assert (outcome.input_tokens, outcome.output_tokens) == (5, 2)


@pytest.mark.parametrize(
    ("reads", "words"),
    [
        ((choice(text="a"), part(error={"message": "a rank died"})), "a rank died"),
        ((choice(text="a"), b"data: [DONE]\n\n"), "without usage"),
        ((part(choices=[], usage={"completion_tokens": 0}),), "without output"),
    ],
)
def test_a_stream_that_cannot_be_counted_failed(reads: tuple[bytes, ...], words: str) -> None:
    assert words in outcome_of(*reads).error


def test_no_more_requests_are_in_flight_than_allowed_and_waiting_is_not_their_latency() -> None:
    async def check() -> None:
        now, running, most = 0.0, 0, 0

        async def send(sample: datasets.Sample) -> Outcome:
            nonlocal now, running, most
            running, started = running + 1, now
            most = max(most, running)
            await asyncio.sleep(0)
            now += 1.0
            running -= 1
            return Outcome(started, sample.input_len)

        samples = [datasets.Sample("a", number, 1) for number in range(6)]
        outcomes, duration = await run_load(send, samples, [0.0] * 6, 2, lambda: now)
        assert most == 2 and duration == now == 6.0
        assert [outcome.input_tokens for outcome in outcomes] == [0, 1, 2, 3, 4, 5]
        assert [outcome.queued for outcome in outcomes] == [outcome.started for outcome in outcomes]

    asyncio.run(check())


OUTCOMES = [
    Outcome(0.0, 10, 5, ttft=0.1, itl=[0.1, 0.3], latency=0.5),
    Outcome(1.0, 20, 1, ttft=0.2, latency=0.2),
    Outcome(1.0, 30, error="HTTP 500: broken"),
    Outcome(1.5, 40, error="HTTP 429: busy"),
]


def test_figures_have_vllms_names_and_hand_worked_values() -> None:
    found = figures(OUTCOMES, 2.0, tuple(METRICS), (99.0, 99.9), {})
    assert {name: value for name, value in found.items() if not name.endswith("_ms")} == {
        "duration": 2.0,
        "completed": 2,
        "failed": 2,
        "total_input_tokens": 30,
        "total_output_tokens": 6,
        "request_throughput": 1.0,
        "request_goodput": None,
        "output_throughput": 3.0,
        "total_token_throughput": 18.0,
        "max_output_tokens_per_s": pytest.approx(5.0),  # all of the first request's, in its first second
        "max_concurrent_requests": 1,
        "first_error": "HTTP 500: broken",
    }
    expected = {
        "mean_ttft_ms": 150, "median_ttft_ms": 150, "std_ttft_ms": 50, "p99_ttft_ms": 199, "p99.9_ttft_ms": 199.9,
        "mean_tpot_ms": 100, "median_tpot_ms": 100, "std_tpot_ms": 0, "p99_tpot_ms": 100, "p99.9_tpot_ms": 100,
        "mean_itl_ms": 200, "median_itl_ms": 200, "std_itl_ms": 100, "p99_itl_ms": 298, "p99.9_itl_ms": 299.8,
        "mean_e2el_ms": 350, "median_e2el_ms": 350, "std_e2el_ms": 150, "p99_e2el_ms": 497, "p99.9_e2el_ms": 499.7,
    }  # fmt: skip
    latencies = {name: value for name, value in found.items() if name.endswith("_ms")}
    assert latencies == pytest.approx(expected)


def test_goodput_counts_the_requests_that_keep_every_limit() -> None:
    def goodput(**limits_ms: float) -> float:
        found = figures(OUTCOMES, 2.0, ("ttft",), (99.0,), limits_ms)["request_goodput"]
        assert isinstance(found, float)
        return found

    assert goodput(ttft=150.0) == goodput(e2el=300.0) == 0.5
    assert goodput(ttft=250.0, tpot=101.0) == 1.0
    assert goodput(tpot=99.0) == 0.5  # the answer of one token has none
    assert goodput(ttft=150.0, e2el=300.0) == 0.0


def test_requests_that_touch_are_not_in_flight_together() -> None:
    outcomes = [
        Outcome(0.0, 1, 1, latency=1.0),
        Outcome(1.0, 1, 1, latency=2.0),
        Outcome(2.0, 1, 1, latency=2.0),
    ]
    assert figures(outcomes, 4.0, (), (), {})["max_concurrent_requests"] == 2


def test_the_report_has_vllms_columns() -> None:
    found = figures(OUTCOMES, 2.0, ("ttft", "itl"), (50.0, 99.0), {"ttft": 150.0})
    lines = list(report_lines({**found, "max_concurrency": 4, "request_rate": 5.0}, ("ttft", "itl")))
    assert [line[:40].rstrip() for line in lines if line[0] not in "=-"] == [
        "Successful requests:", "Failed requests:", "Maximum request concurrency:",
        "Request rate configured (RPS):", "Benchmark duration (s):", "Total input tokens:",
        "Total generated tokens:", "Request throughput (req/s):", "Request goodput (req/s):",
        "Output token throughput (tok/s):", "Peak output token throughput (tok/s):",
        "Peak concurrent requests:", "Total token throughput (tok/s):",
        "Mean TTFT (ms):", "Median TTFT (ms):", "P50 TTFT (ms):", "P99 TTFT (ms):",
        "Mean ITL (ms):", "Median ITL (ms):", "P50 ITL (ms):", "P99 ITL (ms):",
        "First error: HTTP 500: broken",
    ]  # fmt: skip
    assert f"{'Request goodput (req/s):':<40} 0.50" in lines
