"""Coding agents go through a whole tool loop: their request, a call, their tool, its result, the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import MODEL, Machine
from tests.clients.recorder import Exchange, Recorder

pytestmark = pytest.mark.slow
TOLD = "The file says pelican-4711."


def script(name: str, arguments: dict[str, Any]) -> str:
    """What the user says, so that the model calls a tool."""
    return f"CALL {json.dumps({'name': name, 'arguments': arguments})}"


def loop(recorder: Recorder) -> list[Exchange]:
    """The requests with tools, of which there are two: one that is answered by a call, and one with its result."""
    with_tools = [one for one in recorder.generations() if one.body.get("tools")]
    assert len(with_tools) == 2, [(one.path, one.status) for one in recorder.exchanges]
    assert "pelican" not in json.dumps(with_tools[0].body) and "pelican-4711" in json.dumps(
        with_tools[1].body
    )
    return with_tools


@pytest.mark.needs("node_modules/@openai/codex")
def test_codex_runs_a_command_and_reads_its_output(recorder: Recorder, machine: Machine) -> None:
    machine.write(
        ".codex/config.toml",
        f'model = "{MODEL}"\nmodel_provider = "qwen3"\n'
        f'[model_providers.qwen3]\nname = "qwen3_dist"\nbase_url = "{recorder.url}/v1"\nwire_api = "responses"\n',
    )
    prompt = script("exec_command", {"cmd": "cat secret.txt"})
    options = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    assert TOLD in machine.run("codex", "exec", *options, prompt)
    first, _ = loop(recorder)
    assert {"namespace", "web_search"} <= {tool["type"] for tool in first.body["tools"]}


@pytest.mark.needs("node_modules/@anthropic-ai/claude-code")
def test_claude_code_runs_a_command_and_reads_its_output(recorder: Recorder, machine: Machine) -> None:
    prompt = script("Bash", {"command": "cat secret.txt", "description": "reads the file"})
    told = machine.run(
        "claude", "-p", prompt, "--allowedTools", "Bash", "--model", MODEL,
        ANTHROPIC_BASE_URL=recorder.url, ANTHROPIC_AUTH_TOKEN="none",
        ANTHROPIC_DEFAULT_HAIKU_MODEL=MODEL, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )  # fmt: skip
    assert TOLD in told
    loop(recorder)


@pytest.mark.needs("node_modules/@qwen-code/qwen-code")
def test_qwen_code_runs_a_command_and_reads_its_output(recorder: Recorder, machine: Machine) -> None:
    prompt = script("run_shell_command", {"command": "cat secret.txt", "is_background": False})
    told = machine.run(
        "qwen", "--auth-type", "openai", "--approval-mode", "yolo", "-p", prompt,
        OPENAI_BASE_URL=f"{recorder.url}/v1", OPENAI_API_KEY="none", OPENAI_MODEL=MODEL,
    )  # fmt: skip
    assert TOLD in told
    loop(recorder)


@pytest.mark.needs("node_modules/opencode-ai")
def test_opencode_runs_a_command_and_reads_its_output(recorder: Recorder, machine: Machine) -> None:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{recorder.url}/v1", "apiKey": "none"},
        "models": {MODEL: {}},
    }
    config = {"provider": {"qwen3": provider}, "autoupdate": False, "permission": "allow"}
    Path(machine.work / "opencode.json").write_text(json.dumps(config))
    prompt = script("bash", {"command": "cat secret.txt", "description": "reads the file"})
    told = machine.run(
        "opencode", "run", "--model", f"qwen3/{MODEL}", prompt, OPENCODE_DISABLE_MODELS_FETCH="1"
    )
    assert TOLD in told
    loop(recorder)
