"""The command line as a user has it: subprocesses, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_dist.llm import LLM
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.weights.source import resolve_model
from tests.processes import with_environment
from tests.serve_app.support import free_port, wait_for

ENGINE = ("--device", "cpu", "--dtype", "float32", "--num-blocks", "256")
SENTENCE_TIMEOUT_S = 120


def qwen3_dist(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app", *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=SENTENCE_TIMEOUT_S,
        env={**os.environ, **(env or {})},
    )


def refusal(*arguments: str) -> str:
    """The one sentence that a command line is refused with."""
    result = qwen3_dist(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


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


def test_generate_shows_people_the_text_alone() -> None:
    result = qwen3_dist("generate", "--prompt", "hi", "--chat", "--max-tokens", "4", "--seed", "1", *ENGINE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and "token_ids" not in result.stdout


def test_a_checkpoint_without_a_tokenizer_generates_from_token_ids(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(resolve_model("") / name, tmp_path)
    result = qwen3_dist(
        "generate", str(tmp_path), "--prompt-ids", "5,6", "--max-tokens", "3", "--json", *ENGINE
    )
    row = json.loads(result.stdout)
    assert row["text"] is None and len(row["token_ids"]) == 3 and row["logprobs"] is None
    assert "token ids" in refusal("generate", str(tmp_path), "--prompt", "hi", *ENGINE)


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
        (["serve", "/no/such/model"], "/no/such/model"),
        (["serve", "--max-model-len", "4097"], "max_model_len=4097 exceeds the model's context of 4096"),
        (["generate", "--prompt", "hi", "--max-model-len", "4097"], "exceeds the model's context of 4096"),
        (["bench", "latency", "--input-len", "4090", "--output-len", "7"], "exceed the context of 4096"),
        (["serve", "--layout", "tp=3"], "n_heads=8 is not divisible by tp=3"),
        (["serve", "--layout", "tp:2"], "where tp=N"),
        (["serve", "--max-replicas", "many"], "max_replicas must be of type int"),
        (["serve", "--min-replicas", "2"], "max_replicas=1"),
        (["serve", "--device", "tpu"], "device must be one of"),
        (["serve", "--foo"], "--foo"),
        (["serve", "--ray-address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["serve", "--layout", "tp=2", "--cpus-per-rank", "1000"], "1000 CPUs each"),
        (["dance"], "dance"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_sentence(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


def test_a_busy_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal("serve", "--port", port)


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
        wait_for(lambda: not with_environment(f"QWEN3_DIST_TEST={mark}"))


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
    wait_for(lambda: not with_environment(f"QWEN3_DIST_TEST={mark['QWEN3_DIST_TEST']}"))


def test_serve_shows_a_greeting_a_worked_sum_and_a_tool_call_and_leaves_nothing_behind() -> None:
    port, mark = free_port(), {"QWEN3_DIST_TEST": uuid.uuid4().hex}
    arguments = (
        "serve",
        "--layout",
        "tp=2,ep=2",
        "--port",
        str(port),
        "--exit-after-sample",
        "--json",
        *ENGINE,
    )
    result = qwen3_dist(*arguments, env=mark)
    assert result.returncode == 0, result.stderr
    ready, greeting, worked_sum, call, repeat = map(json.loads, result.stdout.splitlines())
    assert "collectives: shared memory" in result.stderr
    assert ready["event"] == "ready" and ready["url"] == f"http://127.0.0.1:{port}/v1"
    assert {event["event"] for event in (greeting, worked_sum, call)} == {"sample"}
    assert greeting["answer"].startswith("Hello")
    assert worked_sum["thought"].startswith("47 + 38") and worked_sum["answer"] == "47 + 38 = 85"
    assert call["tool_call"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert repeat["event"] == "repeat" and f":{port}/v1/chat" in repeat["curl"]
    wait_for(lambda: not with_environment(f"QWEN3_DIST_TEST={mark['QWEN3_DIST_TEST']}"))
    with socket.socket() as caller:  # closed connections may linger on the port, a listener may not
        assert caller.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_serve_cleanly(ending: signal.Signals) -> None:
    port, mark = free_port(), uuid.uuid4().hex
    command = [sys.executable, "-m", "serve_app", "serve", "--port", str(port), *ENGINE]
    environment: dict[str, Any] = {**os.environ, "QWEN3_DIST_TEST": mark}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert "is ready" in process.stdout.readline()
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
        process.send_signal(ending)
        _, complaint = process.communicate(timeout=SENTENCE_TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, complaint
    assert "Traceback" not in complaint
    wait_for(lambda: not with_environment(f"QWEN3_DIST_TEST={mark}"))
