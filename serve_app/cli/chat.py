"""`qwen3-dist chat`: a conversation in a terminal, with a model loaded here or with a running service."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from qwen3_dist.errors import ConfigError, RequestError, ResourceError
from qwen3_dist.settings import EngineConfig
from serve_app.cli.options import MODEL, add_settings, given_settings
from serve_app.settings import read_service_config

HELP = "chat with a model in the terminal, answers streamed; /new begins again, /exit or Ctrl-D ends"
Messages = list[dict[str, Any]]
Pieces = Iterator[tuple[str, str]]  # of the thought and of the answer, as they come
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL + "; with --url the model's name there")
    parser.add_argument(
        "--url", metavar="URL", help="chat with this running service instead of a model loaded here"
    )
    parser.add_argument("--api-key", default="none", metavar="KEY", help="key of the service at --url")
    parser.add_argument("--system", metavar="TEXT", help="system message that begins the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of one answer")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy (default: the checkpoint's, else 1)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="nucleus sampling (default: the checkpoint's, else 1)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampled answers repeatable")
    parser.add_argument("--hide-thinking", action="store_true", help="show no thoughts")
    parser.add_argument("--no-thinking", action="store_true", help="have the model answer without thinking")
    add_settings(parser, "engine", EngineConfig, skip=("model",))


def run(args: argparse.Namespace, out: TextIO) -> int:
    with _remote(args) if args.url else _local(args) as answer:
        converse(args, answer, sys.stdin, out)
    return 0


def converse(
    args: argparse.Namespace, answer: Callable[[Messages], Pieces], lines: TextIO, out: TextIO
) -> None:
    """Answers each line of `lines` on `out`, until they end or one is /exit.

    Ctrl-C ends an answer, and the conversation where none is given. Raises RequestError if a conversation cannot be
    answered, unless a person types it, who is told.
    """
    typed = lines.isatty()
    begun: Messages = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(begun)
    while (line := _next_line(lines, typed)) not in (None, "/exit"):
        if line == "/new":
            messages = list(begun)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        try:
            said = _show(args, answer(messages), out)
        except RequestError as error:
            if not typed:
                raise
            print(f"qwen3-dist: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})


def _next_line(lines: TextIO, typed: bool) -> str | None:
    """The next line without the space around it; None at the end."""
    if typed:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = lines.readline()
    except KeyboardInterrupt:
        line = ""
    if not line and typed:
        print(file=sys.stderr)
    return line.strip() if line else None


def _show(args: argparse.Namespace, pieces: Pieces, out: TextIO) -> str:
    """Prints an answer as it comes, thoughts dimmed in a terminal; returns what was said."""
    told = {"thought": "", "answer": ""}
    dim, plain = (_DIM, _PLAIN) if out.isatty() else ("", "")
    with contextlib.suppress(KeyboardInterrupt):
        for part, text in pieces:
            if not args.json and not (part == "thought" and args.hide_thinking):
                begins_answer = part == "answer" and not told["answer"] and told["thought"]
                ahead = "\n\n" if begins_answer and not args.hide_thinking else ""
                shown = f"{dim}{text}{plain}" if part == "thought" else text
                print(ahead + shown, end="", file=out, flush=True)
            told[part] += text
    print(json.dumps(told) if args.json else "", file=out, flush=True)
    return told["answer"]


def _given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}


@contextlib.contextmanager
def _local(args: argparse.Namespace) -> Iterator[Callable[[Messages], Pieces]]:
    """Answers of a model that is loaded here."""
    engine = read_service_config(given_settings(args, EngineConfig)).engine
    if engine.executor == "auto" and engine.layout.world > 1:
        engine = dataclasses.replace(engine, executor="processes")
    from qwen3_dist.llm import LLM
    from qwen3_dist.sampling_params import SamplingParams
    from qwen3_dist.text.tokenizer import read_generation_defaults
    from qwen3_dist.weights.source import resolve_model

    path = resolve_model(engine.model, engine.revision)
    given = {"max_tokens": None, **read_generation_defaults(path), **_given_sampling(args)}
    params = SamplingParams(**given)
    template_args = {"enable_thinking": False} if args.no_thinking else {}
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    with LLM(**settings, use_tqdm=sys.stderr.isatty()) as llm:

        def answer(messages: Messages) -> Pieces:
            for delta in llm.stream_chat(messages, params, **template_args):
                yield from ((part, text) for part, text in _parts(delta.reasoning, delta.text) if text)

        yield answer


@contextlib.contextmanager
def _remote(args: argparse.Namespace) -> Iterator[Callable[[Messages], Pieces]]:
    """Answers of the service at --url."""
    if given_settings(args, EngineConfig).keys() - {"model"}:
        raise ConfigError("--url names a running service, which has its engine's settings; leave these out")
    from openai import APIError, APIStatusError, OpenAI

    base = args.url.rstrip("/").removesuffix("/v1")
    thinking = {"chat_template_kwargs": {"enable_thinking": False}} if args.no_thinking else {}
    with OpenAI(base_url=f"{base}/v1", api_key=args.api_key) as client:
        try:
            model = args.model or client.models.list().data[0].id
        except APIStatusError as error:
            raise RequestError(_sentence(error)) from None
        except APIError as error:
            raise ResourceError(f"no service answers at {args.url} ({error}); check --url") from None

        def answer(messages: Messages) -> Pieces:
            asked: Any = {"model": model, "messages": messages, "stream": True, **_given_sampling(args)}
            try:
                for chunk in client.chat.completions.create(**asked, extra_body=thinking):
                    for choice in chunk.choices:
                        reasoning = getattr(choice.delta, "reasoning", None)
                        yield from (piece for piece in _parts(reasoning, choice.delta.content) if piece[1])
            except APIError as error:
                raise RequestError(_sentence(error)) from None

        yield answer


def _parts(reasoning: str | None, text: str | None) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("thought", reasoning or ""), ("answer", text or "")


def _sentence(error: Exception) -> str:
    """What the service says of an error, without what the client puts around it."""
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
