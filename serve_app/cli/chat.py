"""`qwen3-dist chat`: a conversation in the terminal, with a local engine or a running service."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, TextIO

from qwen3_dist.errors import ConfigError, RequestError, ResourceError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from serve_app.cli.options import MODEL, add_settings, given_settings

HELP = "chat with a model in the terminal; /new starts a new conversation, /exit or Ctrl-D ends"
Messages = list[dict[str, Any]]
Pieces = Iterator[tuple[str, str]]  # ("thought" or "answer", text), streamed
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help=MODEL + "; with --url: the name of a model of that service"
    )
    parser.add_argument(
        "--url", metavar="URL", help="use the running service at this URL instead of loading a model"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="API key of the service at --url (default: QWEN3_DIST_API_KEY)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of one answer")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy (default: the checkpoint's, else 1)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="nucleus sampling (default: the checkpoint's, else 1)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampled answers repeatable")
    parser.add_argument("--hide-thinking", action="store_true", help="do not show the model's thoughts")
    parser.add_argument("--no-thinking", action="store_true", help="turn thinking off in the chat template")
    add_settings(parser, "engine", EngineConfig, skip=("model",))


def run(args: argparse.Namespace, out: TextIO) -> int:
    with _remote(args) if args.url else _local(args) as answer:
        converse(args, answer, sys.stdin, out)
    return 0


def converse(
    args: argparse.Namespace, answer: Callable[[Messages], Pieces], lines: TextIO, out: TextIO
) -> None:
    """Answers each line of `lines` on `out`, until the end of input or a line /exit.

    Ctrl-C stops the current answer; at the prompt it ends the conversation. On a terminal a RequestError is printed
    and the conversation goes on; otherwise it is raised.
    """
    interactive = lines.isatty()
    start: Messages = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    while (line := _next_line(lines, interactive)) not in (None, "/exit"):
        if line == "/new":
            messages = list(start)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        try:
            text = _print_answer(args, answer(messages), out)
        except RequestError as error:
            if not interactive:
                raise
            print(f"qwen3-dist: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})


def _next_line(lines: TextIO, interactive: bool) -> str | None:
    """The next line, stripped; None at the end of input."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = lines.readline()
    except KeyboardInterrupt:
        line = ""
    if not line and interactive:
        print(file=sys.stderr)
    return line.strip() if line else None


def _print_answer(args: argparse.Namespace, pieces: Pieces, out: TextIO) -> str:
    """Prints an answer while it streams, thoughts dimmed on a terminal. Returns its text without the thoughts."""
    parts = {"thought": "", "answer": ""}
    dim, plain = (_DIM, _PLAIN) if out.isatty() else ("", "")
    with contextlib.suppress(KeyboardInterrupt):
        for part, text in pieces:
            if not args.json and not (part == "thought" and args.hide_thinking):
                begins_answer = part == "answer" and not parts["answer"] and parts["thought"]
                ahead = "\n\n" if begins_answer and not args.hide_thinking else ""
                styled = f"{dim}{text}{plain}" if part == "thought" else text
                print(ahead + styled, end="", file=out, flush=True)
            parts[part] += text
    print(json.dumps(parts) if args.json else "", file=out, flush=True)
    return parts["answer"]


def _given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}


@contextlib.contextmanager
def _local(args: argparse.Namespace) -> Iterator[Callable[[Messages], Pieces]]:
    """Answers of a model that is loaded here."""
    engine = read_settings(EngineConfig, given_settings(args, EngineConfig))
    if engine.executor == "auto" and engine.layout.world > 1:
        engine = dataclasses.replace(engine, executor="processes")
    from qwen3_dist.llm import LLM
    from qwen3_dist.sampling_params import SamplingParams
    from qwen3_dist.text.tokenizer import read_generation_defaults
    from qwen3_dist.weights.source import resolve_model

    path = resolve_model(engine.model, engine.revision)
    params = SamplingParams(**{"max_tokens": None, **read_generation_defaults(path), **_given_sampling(args)})
    template_args = {"enable_thinking": False} if args.no_thinking else {}
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    with LLM(**settings, use_tqdm=sys.stderr.isatty()) as llm:

        def answer(messages: Messages) -> Pieces:
            for delta in llm.stream_chat(messages, params, **template_args):
                yield from ((part, text) for part, text in _parts(delta.reasoning, delta.text) if text)

        yield answer


@contextlib.contextmanager
def _remote(args: argparse.Namespace) -> Iterator[Callable[[Messages], Pieces]]:
    """Yields a function that answers with the service at --url."""
    if given_settings(args, EngineConfig).keys() - {"model"}:
        raise ConfigError("engine settings do not apply to a running service; leave these out or --url")
    from openai import APIError, APIStatusError, OpenAI

    base = args.url.rstrip("/").removesuffix("/v1")
    thinking = {"chat_template_kwargs": {"enable_thinking": False}} if args.no_thinking else {}
    key = args.api_key or os.environ.get("QWEN3_DIST_API_KEY") or "none"
    with OpenAI(base_url=f"{base}/v1", api_key=key) as client:
        try:
            model = args.model or client.models.list().data[0].id
        except APIStatusError as error:
            raise RequestError(_refusal(error)) from None
        except APIError as error:
            raise ResourceError(f"no service answers at {args.url} ({error}); check --url") from None

        def answer(messages: Messages) -> Pieces:
            body: Any = {"model": model, "messages": messages, "stream": True, **_given_sampling(args)}
            try:
                for chunk in client.chat.completions.create(**body, extra_body=thinking):
                    for choice in chunk.choices:
                        reasoning = getattr(choice.delta, "reasoning", None)
                        yield from (piece for piece in _parts(reasoning, choice.delta.content) if piece[1])
            except APIError as error:
                raise RequestError(_refusal(error)) from None

        yield answer


def _parts(reasoning: str | None, text: str | None) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("thought", reasoning or ""), ("answer", text or "")


def _refusal(error: Exception) -> str:
    """Why the service refused a request, and for a missing or wrong key how to give one here."""
    if getattr(error, "status_code", None) == HTTPStatus.UNAUTHORIZED:
        return "the service wants an API key, or another one; give it with --api-key or in QWEN3_DIST_API_KEY"
    return _message(error)


def _message(error: Exception) -> str:
    """The error message of the service, without the text that the client library adds."""
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
