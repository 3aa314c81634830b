"""One measurement of a service: its samples are made, sent and summed up."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen3_dist.arrival_times import arrival_times
from qwen3_dist.errors import ConfigError
from serve_app.load_client import datasets
from serve_app.load_client.client import CHAT, COMPLETIONS, Outcome, Service, ServiceTokens
from serve_app.load_client.datasets import Sample, Shape
from serve_app.load_client.prompts import FileTokens, PromptMaker
from serve_app.load_client.report import METRICS, details, figures
from serve_app.load_client.run import run_load

ENDPOINTS = {"openai": COMPLETIONS, "openai-chat": CHAT}
DATASETS = ("random", "sharegpt", "trace")


@dataclass(frozen=True)
class LoadOptions:
    """What to send to which service; the names are those of the command line's options.

    `model` None is the first that is served, `num_prompts` None all requests of a trace, `max_concurrency` None any
    number. `goodput` has limits in ms by metric.
    """

    url: str
    model: str | None = None
    backend: str = "openai"
    endpoint: str = COMPLETIONS
    api_key: str = ""
    tokenizer: str | None = None
    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int | None = 1000
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    trace_speedup: float = 1.0
    seed: int = 0
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    ignore_eos: bool = True
    temperature: float | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    percentile_metrics: tuple[str, ...] = tuple(METRICS)
    metric_percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] = field(default_factory=dict)


async def measure(options: LoadOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of vLLM's result file, and its lists with one item for each request.

    Raises ConfigError for what the service or a file refuses, and ResourceError if nothing answers.
    """
    async with Service(options.url, options.api_key) as service:
        model, context = await service.model(options.model)
        samples, warmups, times = await _samples(options, service, model, context)
        if times is None:
            times = arrival_times(len(samples), options.request_rate, options.burstiness, options.seed)

        async def send(sample: Sample) -> Outcome:
            return await service.stream(options.endpoint, _body(options, model, sample), sample)

        limit = options.max_concurrency
        warm, _ = await run_load(send, warmups, [0.0] * len(warmups), limit, service.clock)
        if errors := [outcome.error for outcome in warm if outcome.error]:
            raise ConfigError(f"a warm-up request failed, so nothing was measured: {errors[0]}")
        with tqdm(total=len(samples), disable=not sys.stderr.isatty(), unit="req") as progress:
            outcomes, duration = await run_load(send, samples, times, limit, service.clock, progress.update)
    found = figures(
        outcomes, duration, options.percentile_metrics, options.metric_percentiles, options.goodput
    )
    return _about(options, model, len(samples)) | found, details(outcomes)


async def _samples(
    options: LoadOptions, service: Service, model: str, context: int | None
) -> tuple[list[Sample], list[Sample], list[float] | None]:
    """What to measure, what to send before that, and the times of a trace."""
    count, path = options.num_prompts, options.dataset_path
    from_file = options.dataset_name == "sharegpt" and path is not None
    shapes = [] if from_file else _shapes(options)
    _check_context(shapes, context)
    turns = datasets.read_turns(Path(path), options.seed) if from_file and path else []
    tokens = FileTokens(Path(options.tokenizer)) if options.tokenizer else ServiceTokens(service, model)
    maker = await PromptMaker.create(tokens, options.seed)
    samples = await maker.turns(turns, count or 0) if from_file else await maker.samples(shapes)
    if count and len(samples) < count:
        raise ConfigError(f"{path} has {len(samples)} usable requests; lower --num-prompts from {count}")
    _check_context(samples, context)
    # Prompts of their own, so that no measured one is in a prefix cache.
    like = samples[0]
    names = (f"warm-up {number}" for number in range(options.num_warmups))
    prompts = [await maker.prompt(name, like.input_len) for name in names]
    warmups = [Sample(prompt, like.input_len, like.output_len) for prompt in prompts]
    is_trace = options.dataset_name == "trace"
    return samples, warmups, [shape.arrival_s for shape in shapes] if is_trace else None


def _shapes(options: LoadOptions) -> list[Shape]:
    count = options.num_prompts or 0
    if options.dataset_name == "trace" and options.dataset_path:
        return datasets.read_trace(Path(options.dataset_path), options.trace_speedup, options.num_prompts)
    if options.dataset_name == "sharegpt":
        return datasets.sharegpt_shapes(count, options.seed)
    lengths = (options.random_input_len, options.random_output_len, options.random_range_ratio)
    return datasets.random_shapes(count, *lengths, options.random_prefix_len, options.seed)


def _check_context(requests: Sequence[Shape | Sample], context: int | None) -> None:
    lengths = [(request.input_len, request.output_len) for request in requests]
    too_long = [each for each in lengths if context and sum(each) > context]
    if too_long:
        input_len, output_len = max(too_long, key=sum)
        raise ConfigError(
            f"{len(too_long)} of {len(requests)} requests exceed the context of {context} tokens, "
            f"one of them with {input_len} + {output_len}; ask for shorter ones"
        )


def _body(options: LoadOptions, model: str, sample: Sample) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if options.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": sample.prompt}]
        body["max_completion_tokens"] = sample.output_len
    else:
        body |= {"prompt": sample.prompt, "max_tokens": sample.output_len}
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return body | dict(options.extra_body)


def _about(options: LoadOptions, model: str, count: int) -> dict[str, Any]:
    """What vLLM's result file says of a run beside its figures."""
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": options.tokenizer or model,
        "num_prompts": count,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
