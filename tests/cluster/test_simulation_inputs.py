"""Arrivals: drawn and read from traces; what is wrong in one is refused with file, line and reason."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from cluster.simulation.arrivals import Lengths, PoissonArrivals, Request
from cluster.simulation.trace import read_trace
from qwen3_dist.errors import ConfigError

FIXED = Lengths(100)


def test_arrivals_come_at_the_rate_of_each_part_of_the_time() -> None:
    requests = list(PoissonArrivals((50.0, 0.0, 200.0), 30.0, FIXED, Lengths(7), seed=3))
    parts = [[r for r in requests if low <= r.arrival_s < low + 10] for low in (0, 10, 20)]
    assert len(requests) == sum(map(len, parts))
    # counts of a Poisson process vary by their square root: 5 of them are allowed
    assert abs(len(parts[0]) - 500) < 5 * 500**0.5
    assert len(parts[1]) == 0
    assert abs(len(parts[2]) - 2000) < 5 * 2000**0.5
    assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
    assert {(r.input_len, r.output_len) for r in requests} == {(100, 7)}


def test_lognormal_lengths_have_the_mean_and_variation_asked_for() -> None:
    rng = random.Random(1)
    drawn = [Lengths.parse("500:0.8").draw(rng) for _ in range(40_000)]
    assert statistics.mean(drawn) == pytest.approx(500, rel=0.02)
    assert statistics.stdev(drawn) / statistics.mean(drawn) == pytest.approx(0.8, rel=0.05)
    assert min(drawn) >= 1


def test_prompts_begin_with_one_of_the_prefixes() -> None:
    requests = list(PoissonArrivals((100.0,), 10.0, Lengths(60, 1.0), FIXED, prefix_len=32, num_prefixes=4))
    assert {r.prefix_id for r in requests} == {0, 1, 2, 3}
    assert all(r.prefix_len == min(32, r.input_len) for r in requests)


def test_arrivals_are_the_same_each_time_they_are_read() -> None:
    arrivals = PoissonArrivals((5.0,), 10.0, Lengths(60, 1.0), FIXED, seed=9)
    assert list(arrivals) == list(arrivals)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rates": (-1.0,)}, "rate must not be negative"),
        ({"rates": (0.0, 0.0)}, "there are no requests"),
        ({"duration_s": 0.0}, "duration must be above 0"),
        ({"prefix_len": 16}, "both a length and a number"),
        ({"prefix_len": 100, "num_prefixes": 2}, "is not shorter than the mean prompt of 100"),
    ],
)
def test_arrivals_that_cannot_be_are_refused(changes: dict[str, object], reason: str) -> None:
    settings: dict[str, object] = {
        "rates": (1.0,), "duration_s": 10.0, "input_len": FIXED, "output_len": FIXED
    }  # fmt: skip
    with pytest.raises(ConfigError, match=reason):
        PoissonArrivals(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "x", "0", "1.5", "5:-1", "5:x", "nan", "inf", "5:nan"])
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        Lengths.parse(text)


def test_a_trace_in_json_lines_and_in_csv_gives_the_same_requests(tmp_path: Path) -> None:
    lines, table = tmp_path / "trace.jsonl", tmp_path / "trace.csv"
    lines.write_text(
        '{"arrival_s": 0, "input_len": 10, "output_len": 2}\n\n'
        '{"arrival_s": 1.5, "input_len": 300, "output_len": 20, "prefix_id": "chat", "prefix_len": 200}\n'
        '{"arrival_s": 1.5, "input_len": 250, "output_len": 1, "prefix_id": 7, "prefix_len": 16}\n'
    )
    table.write_text(
        "arrival_s,input_len,output_len,prefix_id,prefix_len\n0,10,2,,\n1.5,300,20,chat,200\n1.5,250,1,7,16\n"
    )
    expected = [Request(0.0, 10, 2), Request(1.5, 300, 20, 0, 200), Request(1.5, 250, 1, 1, 16)]
    assert read_trace(lines) == read_trace(table) == expected


def test_a_traces_times_are_counted_from_its_first_arrival(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_len,output_len\n1700000000.5,10,2\n1700000002,10,2\n")
    assert [request.arrival_s for request in read_trace(trace)] == [0.0, 1.5]


GOOD = '{"arrival_s": 2, "input_len": 10, "output_len": 2}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (GOOD + "{nonsense}\n", ":2: not JSON"),
        (GOOD + "[1, 2]\n", ":2: expected a JSON object"),
        (GOOD + '{"arrival_s": 3, "input_len": 10}\n', ":2: output_len is missing"),
        (GOOD + '{"arrival_s": "x", "input_len": 10, "output_len": 2}\n', ":2: arrival_s must be a number"),
        (GOOD + '{"arrival_s": true, "input_len": 10, "output_len": 2}\n', ":2: arrival_s must be a number"),
        (
            GOOD + '{"arrival_s": 3, "input_len": 10.5, "output_len": 2}\n',
            ":2: input_len must be a whole number",
        ),
        (
            GOOD + '{"arrival_s": 3, "input_len": 10, "output_len": 0}\n',
            ":2: output_len must be a whole number",
        ),
        (
            GOOD + '{"arrival_s": -1, "input_len": 10, "output_len": 1}\n',
            ":2: arrival_s must not be negative",
        ),
        (GOOD + '{"arrival_s": 1, "input_len": 10, "output_len": 1}\n', ":2: arrival_s decreases"),
        (GOOD + GOOD.replace("}", ', "inputs": 3}'), ":2: unknown field 'inputs'; known are arrival_s"),
        (GOOD + GOOD.replace("}", ', "prefix_len": 11, "prefix_id": 1}'), ":2: prefix_len=11 is more than"),
        (GOOD + GOOD.replace("}", ', "prefix_len": 5}'), ":2: prefix_len needs a prefix_id"),
        (
            GOOD + '{"arrival_s": 3, "input_len": 90, "output_len": 11}\n',
            ":2: 90 [+] 11 tokens exceed the 100",
        ),
        ("\n", ": the trace holds no request"),
    ],
)
def test_a_wrong_line_of_json_is_refused_with_its_number(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"trace.jsonl{reason}"):
        read_trace(file, max_model_len=100)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("arrival_s,input_len\n0,1\n", ":1: the header lacks output_len"),
        ("", ":1: the header lacks arrival_s"),
        ("arrival_s,input_len,output_len\n0,1,1\n0,1,1,9\n", ":3: more values than the header"),
        ("arrival_s,input_len,output_len\n0,1,1\n0,,1\n", ":3: input_len is missing"),
        ("arrival_s,input_len,output_len\n0,1,1\n0,1,nan\n", ":3: output_len must be a number, not 'nan'"),
    ],
)
def test_a_wrong_line_of_csv_is_refused_with_its_number(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"trace.csv{reason}"):
        read_trace(file)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the trace cannot be read"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="a .jsonl or .csv file"):
        read_trace(tmp_path / "trace.txt")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_trace(tmp_path / "binary.csv")
