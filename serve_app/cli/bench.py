"""`qwen3-dist bench`: throughput or latency of an engine, without a server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from serve_app.cli.options import MODEL, add_settings, given_settings, positive
from serve_app.cli.readable import report_lines

if TYPE_CHECKING:
    from qwen3_dist.benchmark import Workload

HELP = "measure throughput (all prompts at once) or latency (one batch after the other)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=("throughput", "latency"),
        help="all prompts at once, or batches one after the other; `bench serve URL` measures a running service",
    )
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    parser.add_argument(
        "--random-weights",
        metavar="CONFIG.json",
        help="measure a model of this config with random weights, without a checkpoint",
    )
    for name, default, what in (
        ("num-prompts", 16, "prompts"),
        ("input-len", 128, "tokens in each prompt"),
        ("output-len", 64, "tokens generated for each prompt"),
        ("batch-size", 1, "prompts per batch (latency only)"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the random prompts (default: %(default)s)"
    )
    add_settings(parser, "engine", EngineConfig, skip=("model", "load_format"))


def run(args: argparse.Namespace, out: TextIO) -> int:
    settings = given_settings(args, EngineConfig)
    with tempfile.TemporaryDirectory(prefix="qwen3_dist-") as folder:
        if args.random_weights:
            if args.model:
                raise ConfigError("give either MODEL or --random-weights, not both")
            settings |= {"model": _config_only(args.random_weights, Path(folder)), "load_format": "random"}
        config = read_settings(EngineConfig, settings)
        if config.executor == "auto" and config.layout.world > 1:
            config = dataclasses.replace(config, executor="processes")
        result = _measure(args, config)
    if args.random_weights:
        result["model"] = f"{args.random_weights} (random weights)"
    if args.json:
        print(json.dumps(result), file=out)
    else:
        print("\n".join(report_lines(result)), file=out)
    return 0


def _check_length(workload: Workload, context: int) -> None:
    if workload.input_len + workload.output_len > context:
        raise ConfigError(
            f"{workload.input_len} + {workload.output_len} tokens exceed the context of {context}; "
            "lower --input-len or --output-len"
        )


def _measure(args: argparse.Namespace, config: EngineConfig) -> dict[str, object]:
    from qwen3_dist.benchmark import Workload, measure, warm_up
    from qwen3_dist.config import ModelConfig
    from qwen3_dist.engine.engine import Engine
    from qwen3_dist.engine.request_checks import check_context
    from qwen3_dist.weights.source import resolve_model

    batch_size = args.batch_size if args.kind == "latency" else None
    workload = Workload(args.num_prompts, args.input_len, args.output_len, batch_size, args.seed)
    path = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_directory(path, config.hf_overrides)
    check_context(config, model_config)
    _check_length(workload, config.max_model_len or model_config.context_length)
    started = time.perf_counter()
    engine = Engine(config, show_progress=sys.stderr.isatty())
    try:
        start_s = time.perf_counter() - started
        _check_length(workload, engine.max_model_len)
        warm_up(engine)
        figures = measure(engine, workload)
    finally:
        engine.shutdown()
    return {
        "kind": args.kind,
        "model": config.model or "bundled",
        "layout": str(config.layout),
        "backends": engine.backends,
        "dtype": engine.model_config.dtype if config.dtype == "auto" else config.dtype,
        "num_prompts": workload.num_prompts,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "start_s": round(start_s, 2),
        **figures,
    }


def _config_only(path: str, folder: Path) -> str:
    """Copies the config at `path` into `folder`, without the weights that may lie beside it. Returns `folder`."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"--random-weights needs a config.json or a directory with one; {path} is neither")
    shutil.copy(file, folder / "config.json")
    return str(folder)
