"""`qwen3-dist bench serve`: the throughput and latencies of a running service, as `vllm bench serve` measures them."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qwen3_dist.errors import ConfigError
from serve_app.cli.options import number, positive, whole
from serve_app.cli.parser import Switch

HELP = "send requests to a running OpenAI-compatible service and measure it, as vllm bench serve does"
_METRICS, _GOODPUT = ("ttft", "tpot", "itl", "e2el"), ("ttft", "tpot", "e2el")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="of the service, as http://127.0.0.1:8000")
    service = parser.add_argument_group("service")
    service.add_argument("--model", metavar="NAME", help="served model (default: the first of /v1/models)")
    service.add_argument(
        "--backend",
        choices=("openai", "openai-chat"),
        help="API to use (default: openai, which is /v1/completions)",
    )
    service.add_argument("--endpoint", metavar="PATH", help="path of the API (default: the backend's)")
    service.add_argument("--api-key", metavar="KEY", help="(default: OPENAI_API_KEY of the environment)")
    service.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json or its directory, for services without /tokenize; faster for many prompts, too",
    )
    _add_dataset(parser.add_argument_group("dataset"))
    _add_load(parser.add_argument_group("load"))
    _add_report(parser.add_argument_group("report"))


def _add_dataset(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-name",
        choices=("random", "sharegpt", "trace"),
        default="random",
        help="random words; lengths or, with --dataset-path, prompts of ShareGPT; a trace's lengths and times",
    )
    group.add_argument("--dataset-path", metavar="FILE", help="ShareGPT's JSON, or a trace as JSON lines")
    group.add_argument("--num-prompts", type=positive, metavar="N", help="(default: 1000, or all of a trace)")
    for name, default, what in (
        ("input", 1024, "prompt tokens, without the prefix"),
        ("output", 128, "tokens to generate"),
    ):
        group.add_argument(
            f"--random-{name}-len", type=positive, metavar="N", help=f"{what} (default: {default})"
        )
    group.add_argument(
        "--random-range-ratio",
        type=number(0, 1, below=True),
        metavar="R",
        help="lengths vary between 1-R and 1+R times the given ones (default: 0)",
    )
    group.add_argument(
        "--random-prefix-len",
        type=whole,
        metavar="N",
        help="tokens at the beginning that all prompts have in common (default: 0)",
    )
    group.add_argument(
        "--trace-speedup",
        type=number(0, above=True),
        metavar="X",
        help="replay a trace X times as fast; 0.001 if its timestamps are in seconds (default: 1)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of prompts, lengths and times (default: 0)"
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate",
        type=number(0, above=True, infinite=True),
        metavar="R",
        help="requests a second; inf sends all at once (default: inf)",
    )
    group.add_argument(
        "--burstiness",
        type=number(0, above=True, infinite=True),
        metavar="B",
        help="shape of the gamma distribution of the times between requests: 1 is a Poisson process, "
        "less comes in bursts, inf is evenly spaced (default: 1)",
    )
    group.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="requests in flight (default: any number)"
    )
    group.add_argument(
        "--num-warmups",
        type=whole,
        default=0,
        metavar="N",
        help="requests before the measured ones (default: 0)",
    )
    group.add_argument(
        "--ignore-eos",
        action=Switch,
        metavar="true|false",
        help="generate all tokens asked for (default: true, but false for prompts from a ShareGPT file)",
    )
    group.add_argument(
        "--temperature", type=number(0), metavar="T", help="0 is greedy (default: the service's)"
    )
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of each request"
    )


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics",
        type=_names,
        default=",".join(_METRICS),
        metavar="NAMES",
        help="latencies to report (default: %(default)s)",
    )
    group.add_argument(
        "--metric-percentiles",
        type=_percents,
        default="99",
        metavar="P,P",
        help="percentiles of each (default: %(default)s)",
    )
    group.add_argument(
        "--goodput",
        type=_limit,
        nargs="+",
        default=(),
        metavar="NAME:MS",
        help="count requests that keep these limits in ms, as ttft:500 tpot:50",
    )
    group.add_argument("--save-result", action="store_true", help="write the result as a JSON file too")
    group.add_argument(
        "--save-detailed", action="store_true", help="with lists of each request's lengths and times"
    )
    group.add_argument("--result-dir", metavar="DIR", help="where to write it (default: here)")
    group.add_argument(
        "--result-filename", metavar="FILE", help="(default: named by backend, rate, model and time)"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Returns 1 if every request failed, since nothing was measured then. Raises ConfigError and ResourceError."""
    _refuse_contradictions(args)
    from serve_app.load_client.bench import LoadOptions, measure
    from serve_app.load_client.report import report_lines

    options = LoadOptions(**_given(args))
    result, details = asyncio.run(measure(options))
    if args.save_result:
        _save(args, result | (details if args.save_detailed else {}))
    lines = [json.dumps(result)] if args.json else report_lines(result, options.percentile_metrics)
    print("\n".join(lines), file=out)
    return 0 if result["completed"] else 1


def _save(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    name = args.result_filename
    if not name:
        limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
        model = result["model_id"].rpartition("/")[2]
        name = f"{result['backend']}-{result['request_rate']}qps{limit}-{model}-{result['date']}.json"
    file = Path(args.result_dir or ".") / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); correct --result-dir") from None
    print(f"written to {file}", file=sys.stderr)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of LoadOptions that were given, and those that follow from others. Raises ConfigError."""
    from serve_app.load_client.bench import ENDPOINTS, LoadOptions

    names = {field.name for field in dataclasses.fields(LoadOptions)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    endpoint = args.endpoint or ENDPOINTS[args.backend or "openai"]
    if not (endpoint.startswith("/") and endpoint.endswith("/completions")):
        raise ConfigError(f"--endpoint must be a path such as /v1/completions, not {endpoint!r}")
    backend = "openai-chat" if endpoint.endswith("/chat/completions") else "openai"
    if args.backend not in (None, backend):
        raise ConfigError(f"--endpoint {endpoint} is of --backend {backend}, not {args.backend}")
    from_file = args.dataset_name == "sharegpt" and args.dataset_path
    if args.dataset_name == "trace":
        given["num_prompts"] = args.num_prompts
    return given | {
        "endpoint": endpoint,
        "backend": backend,
        "api_key": args.api_key or os.environ.get("OPENAI_API_KEY", ""),
        "ignore_eos": not from_file if args.ignore_eos is None else _on(args.ignore_eos),
        "goodput": dict(args.goodput),
    }


def _refuse_contradictions(args: argparse.Namespace) -> None:
    dataset = args.dataset_name
    options = vars(args)
    for name in (name for name, value in options.items() if value is not None):
        option = f"--{name.replace('_', '-')}"
        if name.startswith("random_") and dataset != "random":
            raise ConfigError(f"{option} needs --dataset-name random, not {dataset}")
        if name.startswith("trace_") and dataset != "trace":
            raise ConfigError(f"{option} needs --dataset-name trace, not {dataset}")
        if name in ("request_rate", "burstiness") and dataset == "trace":
            raise ConfigError(
                f"{option} contradicts --dataset-name trace, which has its own times; use --trace-speedup"
            )
        if name in ("result_dir", "result_filename") and not args.save_result:
            raise ConfigError(f"{option} needs --save-result")
    if args.save_detailed and not args.save_result:
        raise ConfigError("--save-detailed needs --save-result")
    if args.burstiness is not None and math.isinf(args.request_rate or math.inf):
        raise ConfigError("--burstiness needs a finite --request-rate")
    if dataset == "random" and args.dataset_path:
        raise ConfigError("--dataset-path needs --dataset-name sharegpt or trace, not random")
    if dataset == "trace" and not args.dataset_path:
        raise ConfigError("--dataset-name trace needs --dataset-path FILE.jsonl")


def _on(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"--ignore-eos must be true or false, not {text!r}")
    return text.lower() == "true"


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, as in '{{\"top_p\": 0.9}}'")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in _METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(_METRICS)}")
    return names


def _percents(text: str) -> tuple[float, ...]:
    return tuple(map(number(0, 100), text.split(",")))


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in _GOODPUT:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:MS with a name of {', '.join(_GOODPUT)}")
    return name, number(0, above=True)(limit)
