"""`qwen3-dist chat`: turns, thoughts, commands and ends, with the bundled model through pipes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from qwen3_dist.errors import RequestError
from serve_app.cli import build_parser, chat, main
from tests.serve_app.command_line import refusal
from tests.serve_app.fake_openai import KEY, MODEL, fake_openai

GREEDY = ("chat", "--device", "cpu", "--num-blocks", "64", "--temperature", "0", "--max-tokens", "80")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(lines: str, *arguments: str, terminal: bool = True) -> tuple[str, list[list[str]]]:
    """What a conversation prints to a terminal, and the roles of each turn's messages."""
    asked: list[list[str]] = []

    def answer(messages: chat.Messages) -> Iterator[tuple[str, str]]:
        asked.append([message["role"] for message in messages])
        if messages[-1]["content"] == "too long":
            raise RequestError("the prompt is too long")
        yield from (("thought", "hm"), ("answer", "I "), ("answer", "see"))

    out, stdin = _Terminal(), _Terminal(lines) if terminal else io.StringIO(lines)
    chat.converse(build_parser().parse_args(["chat", *arguments]), answer, stdin, out)
    return out.getvalue(), asked


def test_thoughts_are_dimmed_ahead_of_the_answer_and_turns_add_up() -> None:
    text, asked = shown("a\n\nb\n/exit\nc\n")
    assert text == 2 * "\x1b[2mhm\x1b[0m\n\nI see\n"
    assert asked == [["user"], ["user", "assistant", "user"]]


def test_thoughts_can_be_left_out_and_a_conversation_begins_again() -> None:
    text, asked = shown("a\n/new\nb\n", "--hide-thinking", "--system", "s")
    assert text == 2 * "I see\n"
    assert asked == 2 * [["system", "user"]]


def test_a_refused_turn_is_told_to_a_person_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    _, asked = shown("too long\na\n")
    assert asked == [["user"], ["user"]] and "the prompt is too long" in capsys.readouterr().err
    with pytest.raises(RequestError):
        shown("too long\n", terminal=False)


def test_the_bundled_model_chats_through_pipes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\nWhat is 47 + 38?\n"))
    assert main([*GREEDY, "--json"]) == 0
    greeting, worked = map(json.loads, capsys.readouterr().out.splitlines())
    assert greeting["answer"].startswith("Hello")
    assert worked["thought"] and "<think>" not in worked["thought"] + worked["answer"]


def test_a_service_that_does_not_answer_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9/v1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no service answers at http://127.0.0.1:9/v1" in line
    assert main(["chat", "--url", "http://127.0.0.1:9", "--layout", "tp=2"]) == 2
    assert "leave these out" in capsys.readouterr().err


@pytest.mark.parametrize("model", [(), (MODEL,)])
def test_a_service_that_wants_a_key_is_told_how_to_give_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: tuple[str, ...]
) -> None:
    monkeypatch.delenv("QWEN3_DIST_API_KEY", raising=False)
    with fake_openai() as service:
        service.needs_key = True
        for key in ((), ("--api-key", "wrong")):
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n"))
            line = refusal(capsys, "chat", *model, "--url", service.url, *key)
            assert "--api-key or in QWEN3_DIST_API_KEY" in line
        monkeypatch.setattr("sys.stdin", io.StringIO())
        assert main(["chat", *model, "--url", service.url, "--api-key", KEY]) == 0
        monkeypatch.setenv("QWEN3_DIST_API_KEY", KEY)
        assert main(["chat", *model, "--url", service.url]) == 0
