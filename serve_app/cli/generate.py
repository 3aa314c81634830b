"""`qwen3-dist generate`: generates from prompts without a server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from serve_app.cli.options import MODEL, add_settings, given_settings

if TYPE_CHECKING:
    from qwen3_dist.protocol.outputs import RequestOutput

HELP = "generate from prompts and print the results"
_MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    parser.add_argument(
        "text",
        nargs="?",
        help='a prompt; a single argument that is not the name of a model, as "Hello there", is read as a prompt',
    )
    parser.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        metavar="TEXT",
        help="a prompt; may be repeated; without any prompt, standard input is read as one",
    )
    parser.add_argument(
        "--prompt-ids",
        dest="prompts",
        action="append",
        type=_token_ids,
        metavar="1,2,3",
        help="a prompt as token ids; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="send each text prompt through the chat template")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=_MAX_TOKENS,
        metavar="N",
        help="most tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy (default: the checkpoint's, else 1)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="nucleus sampling (default: the checkpoint's, else 1)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample from the K most likely tokens (default: the checkpoint's, else all)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes a sampled result repeatable")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="text that ends the generation; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-sequence token")
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="log-probabilities of each token and of the K most likely ones",
    )
    parser.add_argument("--adapter", metavar="NAME", help="adapter of --lora to generate with")
    parser.add_argument("--ray-address", help="address of a Ray cluster to run the ranks on, or 'auto'")
    add_settings(parser, "engine", EngineConfig, skip=("model",))


def run(args: argparse.Namespace, out: TextIO) -> int:
    args.model, args.prompts = _model_and_prompts(args, sys.stdin)
    engine = read_settings(EngineConfig, given_settings(args, EngineConfig))
    if args.chat and any(not isinstance(prompt, str) for prompt in args.prompts):
        raise ConfigError("--chat takes text; give --prompt instead of --prompt-ids")
    from qwen3_dist.text.tokenizer import read_generation_defaults
    from qwen3_dist.weights.source import resolve_model

    params = _params(args, read_generation_defaults(resolve_model(engine.model, engine.revision)))
    for output in _generate(args, engine, params):
        _print(output, args.json, out)
    return 0


def _model_and_prompts(args: argparse.Namespace, stdin: TextIO | None) -> tuple[str, list[str | list[int]]]:
    """The model's name and the prompts: those of the command line, or else all of `stdin` as one.

    Raises ConfigError if there is no prompt.
    """
    from qwen3_dist.weights.source import may_be_model

    model, prompts = args.model, list(args.prompts or ())
    if args.text is not None:
        prompts.insert(0, args.text)
    if not prompts and model and not may_be_model(model):
        model, prompts = "", [model]
    if not prompts and stdin is not None and not stdin.isatty():
        text = stdin.read().removesuffix("\n")
        prompts = [text] if text else []
    if not prompts:
        raise ConfigError(
            "there is no prompt; give a text, --prompt or --prompt-ids, or write one to standard input"
        )
    return model, prompts


def _params(args: argparse.Namespace, defaults: dict[str, Any]) -> SamplingParams:
    names = ("temperature", "top_p", "top_k", "seed", "logprobs")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given |= {"max_tokens": args.max_tokens, "stop": tuple(args.stop or ()), "ignore_eos": args.ignore_eos}
    return SamplingParams(**defaults | given)


def _generate(args: argparse.Namespace, engine: EngineConfig, params: SamplingParams) -> list[RequestOutput]:
    from qwen3_dist.llm import LLM

    if args.ray_address:
        from cluster import ray_cluster

        ray_cluster.connect(args.ray_address)
        engine = dataclasses.replace(engine, executor="ray")
    elif engine.executor == "auto" and engine.layout.world > 1:
        engine = dataclasses.replace(engine, executor="processes")  # one machine, one call: no cluster needed
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    try:
        with LLM(**settings) as llm:
            if not args.chat:
                return llm.generate(args.prompts, params, lora=args.adapter)
            conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompts]
            return llm.chat(conversations, params, lora=args.adapter)
    finally:
        if args.ray_address:
            ray_cluster.shutdown()


def _print(output: RequestOutput, as_json: bool, out: TextIO) -> None:
    if as_json:
        result = {
            "token_ids": output.token_ids,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "logprobs": None if output.logprobs is None else [asdict(p) for p in output.logprobs],
        }
        print(json.dumps(result), file=out, flush=True)
        return
    print(output.text if output.text is not None else ",".join(map(str, output.token_ids)), file=out)
    for p in output.logprobs or ():
        print(
            f"{p.token_id}\t{p.logprob:.4f}\t" + " ".join(f"{i}:{value:.4f}" for i, value in p.top), file=out
        )
    print(f"[{len(output.token_ids)} tokens, {output.finish_reason}]", file=sys.stderr)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of token ids") from None
