"""The command line in this process, for what it says, and in one of its own, for what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serve_app.cli import main

ENGINE = ("--device", "cpu", "--dtype", "float32", "--num-blocks", "256")
TIMEOUT_S = 240


def qwen3_dist(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`qwen3-dist ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "serve_app", *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **(env or {})},
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line prints to stdout when it succeeds."""
    code = main(arguments)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a command line is refused with."""
    try:
        code: object = main(arguments)
    except SystemExit as exit:
        code = exit.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, ""), shown
    *_, line = shown.err.strip().splitlines()
    assert "Traceback" not in shown.err
    return line
