"""The command line as a user has it: subprocesses, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from qwen3_dist.llm import LLM
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.weights.source import resolve_model
from tests.processes import wait_until_none_has
from tests.serve_app.command_line import ENGINE, TIMEOUT_S, printed, qwen3_dist, refusal
from tests.serve_app.support import free_port


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,ep=2"])
def test_generate_prints_one_json_object_per_prompt_and_nothing_else(layout: str) -> None:
    result = qwen3_dist(
        "generate", "--prompt", "the sea", "--prompt-ids", "5,6,7", "--max-tokens", "6", "--temperature", "0",
        "--logprobs", "2", "--json", "--layout", layout, *ENGINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    with LLM(dtype="float32", device="cpu", num_blocks=64, use_tqdm=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
        expected = llm.generate(["the sea", [5, 6, 7]], params, use_tqdm=False)
    assert [row["token_ids"] for row in rows] == [output.token_ids for output in expected]
    assert [row["text"] for row in rows] == [output.text for output in expected]
    for row in rows:
        assert row["finish_reason"] == "length"
        assert [p["token_id"] for p in row["logprobs"]] == row["token_ids"]
        assert all(
            len(p["top"]) == 2 and p["top"][0] == [p["token_id"], p["logprob"]] for p in row["logprobs"]
        )


def test_generate_shows_people_the_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "generate", "--prompt", "hi", "--chat", "--max-tokens", "4", "--seed", "1", *ENGINE
    )
    assert text.strip() and "token_ids" not in text


def test_a_checkpoint_without_a_tokenizer_generates_from_token_ids(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(resolve_model("") / name, tmp_path)
    arguments = ("generate", str(tmp_path), "--prompt-ids", "5,6", "--max-tokens", "3", "--json", *ENGINE)
    row = json.loads(printed(capsys, *arguments))
    assert row["text"] is None and len(row["token_ids"]) == 3 and row["logprobs"] is None
    assert "token ids" in refusal(capsys, "generate", str(tmp_path), "--prompt", "hi", *ENGINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt", "hi", "--temperature", "-1"], "temperature must be a number from 0 to 2"),
        (["generate", "--prompt", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "--prompt-ids", "1,b"], "comma-separated"),
        (["generate", "--prompt-ids", "1", "--chat"], "--chat"),
        (["generate", "/no/such/model", "--prompt", "hi"], "/no/such/model"),
        (["inspect", "/no/such/model"], "/no/such/model"),
        (["inspect", "--world", "-3"], "'-3' is not a positive number"),
        (["serve", "/no/such/model"], "/no/such/model"),
        (["serve", "--max-model-len", "4097"], "max_model_len=4097 exceeds the model's context of 4096"),
        (["generate", "--prompt", "hi", "--max-model-len", "4097"], "exceeds the model's context of 4096"),
        (["bench", "latency", "--input-len", "4090", "--output-len", "7"], "exceed the context of 4096"),
        (["serve", "--layout", "tp=3"], "n_heads=8 is not divisible by tp=3"),
        (["serve", "--layout", "tp:2"], "where tp=N"),
        (["serve", "--max-replicas", "many"], "max_replicas must be a whole number"),
        (["serve", "--min-replicas", "2"], "max_replicas=1"),
        (["serve", "--device", "tpu"], "device must be one of"),
        (["serve", "--foo"], "--foo"),
        (["dance"], "dance"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert words in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ray-address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--layout", "tp=2", "--cpus-per-rank", "1000"], "1000 CPUs each"),
    ],
)
def test_what_ray_refuses_is_told_in_one_sentence(arguments: list[str], words: str) -> None:
    result = qwen3_dist("serve", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert words in result.stderr.strip().splitlines()[-1]


def test_a_busy_port_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal(capsys, "serve", "--port", port)


def test_a_port_that_is_taken_while_ray_starts_is_refused_in_one_sentence_too() -> None:
    command = (
        "from serve_app import cli, launch; launch.check_port = lambda _: None; raise SystemExit(cli.main())"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        arguments = ("serve", "--port", str(taken.getsockname()[1]), *ENGINE)
        mark = uuid.uuid4().hex
        environment = {**os.environ, "QWEN3_DIST_TEST": mark}
        result = subprocess.run(
            [sys.executable, "-c", command, *arguments], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 2, result.stderr
        assert "choose another --host or --port" in result.stderr.strip().splitlines()[-1]
        wait_until_none_has(f"QWEN3_DIST_TEST={mark}")


def test_a_damaged_checkpoint_names_its_damage_through_serve_and_leaves_nothing(tmp_path: Path) -> None:
    shutil.copytree(resolve_model(""), tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.chmod(0o600)
    os.truncate(weights, weights.stat().st_size // 2)
    mark = {"QWEN3_DIST_TEST": uuid.uuid4().hex}
    arguments = ("serve", str(tmp_path), "--port", str(free_port()), "--layout", "tp=2", *ENGINE)
    result = qwen3_dist(*arguments, env=mark)
    assert result.returncode == 2
    assert "model.safetensors" in result.stderr.strip().splitlines()[-1]
    wait_until_none_has(f"QWEN3_DIST_TEST={mark['QWEN3_DIST_TEST']}")


@pytest.mark.parametrize(
    "ending",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_serve_shows_a_sample_and_leaves_nothing_when_it_ends(ending: signal.Signals | None) -> None:
    port, mark = free_port(), uuid.uuid4().hex
    sample = "--sample" if ending else "--exit-after-sample"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "serve_app",
            "serve",
            "--layout",
            "tp=2,ep=2",
            "--port",
            str(port),
            sample,
            "--json",
        ]
        + [*ENGINE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "QWEN3_DIST_TEST": mark},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        ready, *samples, repeat = (json.loads(process.stdout.readline()) for _ in range(5))
        if ending:
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
            os.killpg(process.pid, ending)  # as terminals and `timeout` do
        _, complaint = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, complaint
    assert "Traceback" not in complaint and "collectives: shared memory" in complaint
    assert ready["event"] == "ready" and ready["url"] == f"http://127.0.0.1:{port}/v1"
    assert [event["event"] for event in samples] == ["sample"] * 3
    greeting, worked_sum, call = samples
    assert greeting["answer"].startswith("Hello")
    assert worked_sum["thought"].startswith("47 + 38") and worked_sum["answer"] == "47 + 38 = 85"
    assert call["tool_call"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert repeat["event"] == "repeat" and f":{port}/v1/chat" in repeat["curl"]
    wait_until_none_has(f"QWEN3_DIST_TEST={mark}")
    with socket.socket() as caller:  # closed connections may linger on the port, a listener may not
        assert caller.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
