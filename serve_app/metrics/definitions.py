"""The table of all metrics: names, meanings, labels and buckets.

The first part has vLLM's names, meanings and buckets, so that dashboards, autoscalers and gateways made for vLLM read
them; the setting `metrics_prefix` replaces the `vllm` in front. The others are this project's and begin with
`qwen3_dist:`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OWN_PREFIX = "qwen3_dist"
VLLM_PREFIX = "vllm"


@dataclass(frozen=True)
class Definition:
    """One metric. `kind` is "counter", "gauge" or "histogram"; `buckets` are the upper bounds of a histogram.

    Counters have no `_total` here; expositions add it. Older names of vLLM's are `aliases`.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    own: bool = False
    aliases: tuple[str, ...] = ()

    def full_name(self, prefix: str, separator: str = ":") -> str:
        """The name with `prefix`, or with the project's own in front."""
        return f"{OWN_PREFIX if self.own else prefix}{separator}{self.name}"

    def alias_names(self, prefix: str) -> list[str]:
        return [f"{prefix}:{alias}" for alias in self.aliases]


_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_LENGTHS = tuple(float(mantissa * 10**exponent) for exponent in range(6) for mantissa in (1, 2, 5))

DEFINITIONS: list[Definition] = []


def _defining(kind: str, own: bool) -> Callable[..., Definition]:
    def define(
        name: str,
        help: str,
        *labels: str,
        buckets: tuple[float, ...] = (),
        aliases: tuple[str, ...] = (),
    ) -> Definition:
        definition = Definition(name, kind, help, labels, buckets, own, aliases)
        DEFINITIONS.append(definition)
        return definition

    return define


# vLLM's. Sequences count as requests: each choice of each prompt, as with vLLM.
_counter, _gauge, _histogram = (_defining(kind, False) for kind in ("counter", "gauge", "histogram"))

NUM_RUNNING = _gauge("num_requests_running", "Requests in the engine's batches.")
NUM_WAITING = _gauge("num_requests_waiting", "Requests that wait to be scheduled.")
NUM_SWAPPED = _gauge("num_requests_swapped", "Requests swapped to CPU memory: always 0, nothing is swapped.")
KV_USAGE = _gauge(
    "kv_cache_usage_perc",
    "Share of the KV-cache blocks in use, from 0 to 1.",
    aliases=("gpu_cache_usage_perc",),
)
PREFIX_QUERIES = _counter(
    "prefix_cache_queries",
    "Prompt tokens looked up in the prefix cache.",
    aliases=("gpu_prefix_cache_queries",),
)
PREFIX_HITS = _counter(
    "prefix_cache_hits",
    "Prompt tokens found in the prefix cache.",
    aliases=("gpu_prefix_cache_hits",),
)
PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens, cached ones included.")
GENERATION_TOKENS = _counter("generation_tokens", "Tokens generated.")
PREEMPTIONS = _counter("num_preemptions", "Preemptions of running requests.")
DRAFT_TOKENS = _counter("spec_decode_num_draft_tokens", "Draft tokens that were verified.")
ACCEPTED_TOKENS = _counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
REQUEST_SUCCESS = _counter(
    "request_success", "Requests that ended, by reason: stop, length, abort, error.", "finished_reason"
)
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "Seconds from a request's arrival to its first token.",
    buckets=_TO_FIRST_TOKEN,
)
INTER_TOKEN_LATENCY = _histogram(
    "inter_token_latency_seconds",
    "Seconds between two tokens of a request.",
    buckets=_BETWEEN_TOKENS,
    aliases=("time_per_output_token_seconds",),
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "request_time_per_output_token_seconds",
    "Mean seconds between a request's tokens.",
    buckets=_BETWEEN_TOKENS,
)
E2E_LATENCY = _histogram(
    "e2e_request_latency_seconds", "Seconds from a request's arrival to its end.", buckets=_LATENCY
)
QUEUE_TIME = _histogram(
    "request_queue_time_seconds", "Seconds until a request was first scheduled.", buckets=_LATENCY
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", "Seconds from first scheduled to the first token.", buckets=_LATENCY
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", "Seconds from the first token to the last.", buckets=_LATENCY
)
INFERENCE_TIME = _histogram(
    "request_inference_time_seconds", "Seconds from first scheduled to the last token.", buckets=_LATENCY
)
REQUEST_PROMPT_TOKENS = _histogram("request_prompt_tokens", "Prompt tokens of a request.", buckets=_LENGTHS)
REQUEST_GENERATION_TOKENS = _histogram(
    "request_generation_tokens", "Generated tokens of a request.", buckets=_LENGTHS
)
CACHE_CONFIG = _gauge(
    "cache_config_info",
    "The KV cache; always 1.",
    *("block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "num_gpu_blocks"),
)
LORA_REQUESTS = _gauge(
    "lora_requests_info",
    "Adapters of running and waiting requests; the value is the Unix time of the reading.",
    *("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)
SLEEP_STATE = _gauge(
    "engine_sleep_state",
    "1 for the state that the engine is in, else 0: awake, weights_offloaded (sleep level 1), discard_all (level 2).",
    "sleep_state",
)

# This project's, of a replica.
_counter, _gauge, _histogram = (_defining(kind, True) for kind in ("counter", "gauge", "histogram"))

STEPS = _counter("steps", "Steps of the engine.")
RANK_REPLACEMENTS = _counter("rank_replacements", "Lost ranks that others replaced, without a reload.")
RANKS_ABSENT = _gauge("ranks_absent", "Ranks without which the engine runs, since no others can be had.")
REPEATED_STEPS = _counter("repeated_steps", "Steps run again because an all-to-all's capacity overflowed.")
WEIGHTS = _gauge(
    "weights_info", "The version of the weights, empty for the model's own; always 1.", "version"
)
STEP_SEQUENCES = _counter("step_sequences", "Sequences in all steps; over steps it is the mean batch size.")
STEP_TOKENS = _counter("step_tokens", "Tokens in all steps: of prompts, decodes and drafts.")
LAST_STEP_SEQUENCES = _gauge("last_step_sequences", "Sequences in the last step.")
LAST_STEP_TOKENS = _gauge("last_step_tokens", "Tokens in the last step.")
STEP_AGE = _gauge("step_age_seconds", "Seconds for which the step in flight has run; 0 if none is.")
DISPATCHED_TOKENS = _counter(
    "dispatched_tokens",
    "Tokens sent to experts: each token counts for each of its experts in each MoE layer.",
)
WIRE_BYTES = _counter(
    "wire_bytes",
    "Bytes that ranks got from each other, computed from the layout: by tensor-parallel all-reduces, the "
    "exchange of MoE layers (experts), and between pipeline stages.",
    "exchange",
)
RANK_WAIT = _counter(
    "rank_wait_seconds",
    "Seconds in which ranks had no step to run, since there were no requests or the engine had not planned it.",
    "waits_for",
)
RANK_OWN = _counter(
    "rank_own_seconds",
    "Seconds that a rank worked on steps itself, not waiting for others; they wait for the rank with most. Not told "
    "by ranks whose collectives NCCL carries; read every 10 s.",
    "rank",
)
EXPERT_IMBALANCE = _gauge(
    "expert_imbalance",
    "Tokens of the busiest expert-parallel rank over the mean, by MoE layer, since the start; read every 10 s.",
    "layer",
)

# This project's, of an ingress.
HTTP_REQUESTS = _counter("http_requests", "HTTP requests answered.", "route", "method", "status")
HTTP_IN_FLIGHT = _gauge("http_requests_in_flight", "HTTP requests in flight.")
HTTP_STREAMS = _gauge("http_streams_in_flight", "Streamed answers in flight.")
HTTP_REFUSED = _counter(
    "http_refused",
    "HTTP requests refused: key, key_limit, timeout, too_large, overloaded, unavailable.",
    "reason",
)
SEQUENCES_IN_FLIGHT = _gauge("sequences_in_flight", "Sequences that count towards the limit.")
SEQUENCES_LIMIT = _gauge("sequences_limit", "Sequences beyond which requests are answered 429.")
REPLICAS_HEALTHY = _gauge("replicas_healthy", "Replicas that were healthy when last asked.", "model_name")
REPLICAS_LOST = _counter(
    "replicas_lost", "Replicas that died or hung; Ray Serve starts another for each.", "model_name"
)
REPLICA_LOSSES = _counter("request_replica_losses", "Times that a request lost its replica.", "model_name")
REPLICAS_SILENT = _counter(
    "replicas_silent", "Replicas of models and of the ingress that did not answer a scrape in time."
)

BY_NAME = {definition.name: definition for definition in DEFINITIONS}
