"""`qwen3-dist bench serve` as a user has it, against a service whose answers are known and against the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.weights.source import bundled_path
from serve_app.cli import main
from tests.serve_app.command_line import printed, refusal
from tests.serve_app.fake_openai import CONTEXT, FIRST_PART_S, KEY, MODEL, FakeOpenAI, fake_openai
from tests.serve_app.support import free_port

SMALL = ("--random-input-len", "30", "--random-output-len", "6", "--num-prompts", "8")


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with fake_openai() as service:
        yield service


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    (line,) = printed(capsys, "bench", "serve", *arguments, "--json").splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


def test_tokens_requests_and_failures_are_counted_exactly(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.together, fake.failing, fake.breaking = 4, {2, 5}, {6}
    result = measured(capsys, fake.url, *SMALL, "--max-concurrency", "4", "--goodput", "ttft:1e9")
    assert (result["completed"], result["failed"], result["num_prompts"]) == (5, 3, 8)
    assert result["first_error"] in (
        "HTTP 500: no luck with 2",
        "HTTP 500: no luck with 5",
        "the stream broke",
    )
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (5 * 30, 5 * 6)
    assert fake.most_running == 4 and result["max_concurrent_requests"] <= 4
    assert (result["model_id"], result["backend"], result["request_rate"]) == (MODEL, "openai", "inf")
    rates = {"request": 5, "output": 30, "total_token": 180}
    for name, count in rates.items():
        assert result[f"{name}_throughput"] * result["duration"] == pytest.approx(count)
    assert result["request_goodput"] == result["request_throughput"]
    # The service waits before its first part. Nothing else about time is certain on a busy machine.
    for name in ("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"):
        assert 0.99e3 * FIRST_PART_S < result[name] <= result[name.replace("ttft", "e2el")]
    assert result["mean_e2el_ms"] <= 1e3 * result["duration"]
    assert result["mean_tpot_ms"] * 5 == pytest.approx(result["mean_e2el_ms"] - result["mean_ttft_ms"])
    # Parts hold two tokens, so there are two gaps where there are five tokens after the first.
    assert result["mean_itl_ms"] * 2 == pytest.approx(result["mean_tpot_ms"] * 5)


def test_requests_say_what_was_asked_for(fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ("--temperature", "0.5", "--extra-body", '{"top_p": 0.9}', "--random-prefix-len", "4")
    measured(capsys, fake.url, *SMALL, *extra, "--num-warmups", "2")
    assert len(fake.bodies) == 10
    prompts = [body.pop("prompt").split() for body in fake.bodies]
    assert [len(prompt) for prompt in prompts] == [33] * 10  # and the special token before each
    assert len({tuple(prompt[:4]) for prompt in prompts[2:]}) == 1
    assert len({tuple(prompt[4:]) for prompt in prompts}) == 10
    assert {json.dumps(body, sort_keys=True) for body in fake.bodies} == {
        json.dumps(
            {
                "model": MODEL,
                "max_tokens": 6,
                "ignore_eos": True,
                "temperature": 0.5,
                "top_p": 0.9,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            sort_keys=True,
        )
    }


@pytest.mark.parametrize("choice", [("--backend", "openai-chat"), ("--endpoint", "/v1/chat/completions")])
def test_conversations_are_measured_too(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], choice: tuple[str, ...]
) -> None:
    options = ("--no-ignore-eos", "--model", "other", "--request-rate", "1000", "--burstiness", "2")
    result = measured(capsys, fake.url + "/v1/", *SMALL, *choice, *options)
    assert (result["completed"], result["total_output_tokens"], result["backend"]) == (8, 48, "openai-chat")
    assert (result["request_rate"], result["model_id"]) == (1000, "other")
    (message,) = fake.bodies[0]["messages"]
    assert message["role"] == "user" and len(message["content"].split()) == 29
    assert fake.bodies[0]["model"] == "other" and "ignore_eos" not in fake.bodies[0]


def test_a_trace_is_replayed_with_its_lengths(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "trace.jsonl"
    lengths = [(11, 2), (5, 4), (7, 6)]
    lines = [
        {"timestamp": 400 * number, "input_length": input_len, "output_length": output_len}
        for number, (input_len, output_len) in enumerate(lengths)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    trace = ("--dataset-name", "trace", "--dataset-path", str(file))
    result = measured(capsys, fake.url, *trace, "--trace-speedup", "4")
    assert [(len(body["prompt"].split()) + 1, body["max_tokens"]) for body in fake.bodies] == lengths
    assert result["completed"] == 3 and result["duration"] >= 0.2
    assert "has 3 usable requests; lower --num-prompts from 4" in refusal(
        capsys, "bench", "serve", fake.url, *trace, "--num-prompts", "4"
    )


def test_prompts_of_a_sharegpt_file_have_the_lengths_of_their_answers(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    turns = [
        ("a question of words", "an answer of five words"),
        ("hi", "a question of two tokens is too short"),
        ("a question of words", "and " * (CONTEXT + 1)),  # which the service refuses to tokenize
    ]
    said = [{"conversations": [{"value": value} for value in turn]} for turn in turns]
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(said))
    options = (fake.url, "--dataset-name", "sharegpt", "--dataset-path", str(file), "--num-prompts")
    result = measured(capsys, *options, "1")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (5, 5)
    assert fake.bodies[0]["prompt"] == turns[0][0] and "ignore_eos" not in fake.bodies[0]
    assert "has 1 usable requests" in refusal(capsys, "bench", "serve", *options, "2")


def test_results_are_saved_as_vllm_saves_them(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake.failing = {1}
    save = ("--save-result", "--result-dir", str(tmp_path / "results"))
    percentiles = ("--percentile-metrics", "tpot", "--metric-percentiles", "50,99.9")
    shown = printed(capsys, "bench", "serve", fake.url, *SMALL, *save, *percentiles)
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.startswith(f"openai-infqps-{MODEL}-")
    result = json.loads(file.read_text())
    assert {name for name in result if name.endswith("_ms")} == {
        "mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p50_tpot_ms", "p99.9_tpot_ms"
    }  # fmt: skip
    assert f"{'Successful requests:':<40} 7\n" in shown and "First error: HTTP 500: no luck with 1" in shown
    measured(capsys, fake.url, *SMALL, *save, "--save-detailed", "--result-filename", "all.json")
    lists = json.loads((tmp_path / "results" / "all.json").read_text())
    assert lists["output_lens"] == [6] * 8 and lists["errors"] == [""] * 8 and len(lists["itls"][0]) == 2


def test_a_run_in_which_all_requests_fail_is_no_success(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = set(range(9))
    assert main(["bench", "serve", fake.url, *SMALL]) == 1
    assert f"{'Failed requests:':<40} 8\n" in capsys.readouterr().out
    assert "a warm-up request failed, so nothing was measured: HTTP 500" in refusal(
        capsys, "bench", "serve", fake.url, *SMALL, "--num-warmups", "1"
    )


def test_a_service_without_a_tokenizer_needs_one_here(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.has_tokenizer = False
    line = refusal(capsys, "bench", "serve", fake.url, *SMALL)
    assert "has no /tokenize" in line and "give --tokenizer DIR" in line
    assert measured(capsys, fake.url, *SMALL, "--tokenizer", str(bundled_path()))["completed"] == 8


def test_the_key_is_given_or_taken_from_the_environment(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.needs_key = True
    assert "refuses the API key; give --api-key" in refusal(capsys, "bench", "serve", fake.url, *SMALL)
    assert measured(capsys, fake.url, *SMALL, "--api-key", KEY)["completed"] == 8
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert measured(capsys, fake.url, *SMALL)["completed"] == 8


def test_what_a_service_does_not_have_is_refused(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"model 'x' is not served at {fake.url}; it has words, other" in refusal(
        capsys, "bench", "serve", fake.url, "--model", "x"
    )
    assert f"8 of 8 requests exceed the context of {CONTEXT} tokens, one of them with 3999 + 6" in refusal(
        capsys, "bench", "serve", fake.url, *SMALL, "--random-input-len", "3999"
    )
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert f"nothing answers at {nowhere}" in refusal(capsys, "bench", "serve", nowhere)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dataset-path", "f"), "--dataset-path needs --dataset-name sharegpt or trace"),
        (("--dataset-name", "trace"), "needs --dataset-path FILE.jsonl"),
        (("--dataset-name", "trace", "--dataset-path", "f", "--request-rate", "3"), "has its own times"),
        (("--dataset-name", "sharegpt", "--random-input-len", "9"), "needs --dataset-name random"),
        (("--trace-speedup", "2"), "--trace-speedup needs --dataset-name trace"),
        (("--burstiness", "2"), "--burstiness needs a finite --request-rate"),
        (("--burstiness", "2", "--request-rate", "inf"), "--burstiness needs a finite --request-rate"),
        (("--result-dir", "d"), "--result-dir needs --save-result"),
        (("--save-detailed",), "--save-detailed needs --save-result"),
        (("--backend", "openai", "--endpoint", "/v1/chat/completions"), "is of --backend openai-chat"),
        (("--endpoint", "/v1/embeddings"), "must be a path such as /v1/completions"),
        (("--request-rate", "0"), "'0' is not a number above 0"),
        (("--random-range-ratio", "1"), "'1' is not a number of at least 0 and below 1"),
        (("--metric-percentiles", "50,101"), "'101' is not a number of at least 0 and at most 100"),
        (("--percentile-metrics", "ttft,tbt"), "'tbt' is not one of ttft, tpot, itl, e2el"),
        (("--goodput", "itl:5"), "'itl:5' is not NAME:MS"),
        (("--extra-body", "[1]"), "is not a JSON object"),
        (("--ignore-eos", "--num-warmups", "-1"), "'-1' is not a whole number"),
        (("--max-concurency", "1"), "did you mean --max-concurrency?; see qwen3-dist bench serve --help"),
        (("--base-url", "http://x"), "give the URL as the argument"),
        (("--dataset-name", "trace", "--dataset-path", "/no/such"), "cannot be read (No such file"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    fake: FakeOpenAI, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, "bench", "serve", fake.url, *options)


def test_a_url_without_a_scheme_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "URL must begin with http:// or https://" in refusal(capsys, "bench", "serve", "localhost:8000")


def test_it_starts_without_torch_ray_or_numpy() -> None:
    code = "import sys, serve_app.cli, serve_app.load_client.bench; "
    code += "sys.exit(', '.join({'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_real_service_is_measured(url: str, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    options = ("--backend", backend, "--max-concurrency", "4", "--random-prefix-len", "10")
    result = measured(capsys, url, *SMALL, *options, "--temperature", "0")
    assert (result["completed"], result["failed"], result["first_error"]) == (8, 0, None)
    assert result["total_output_tokens"] == 8 * 6
    extra = result["total_input_tokens"] - 8 * 40
    assert extra == 0 if backend == "openai" else extra > 0 == extra % 8  # the chat template's tokens
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"]
