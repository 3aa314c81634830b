"""Who else reads the service's metrics, and what: names, labels and the form of their queries."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels import serve_llm_dashboard_config

# A metric in PromQL: what stands before its labels or its range.
_NAME = re.compile(r"[a-zA-Z_:][\w:]*(?=\s*[{\[])")
# Features that this service has not: transfer between prefill and decode engines, and KV offloading.
_OTHER_FEATURES = re.compile(r"ray_vllm_(nixl|kv_offload|external_prefix_cache)_")

# Panels of KubeRay's sample dashboard for Serve LLM: metrics at Ray's agent, without their endings.
KUBERAY = {
    *("generation_tokens_total", "prompt_tokens_total", "request_success_total", "kv_cache_usage_perc"),
    *("num_requests_running", "num_requests_swapped", "num_requests_waiting"),
    *("prefix_cache_hits_total", "prefix_cache_queries_total"),
    *(
        "request_queue_time_seconds_sum",
        "request_prefill_time_seconds_sum",
        "request_decode_time_seconds_sum",
    ),
    *(
        f"{name}_{end}"
        for name in (
            "e2e_request_latency_seconds",
            "request_generation_tokens",
            "request_prompt_tokens",
            "request_time_per_output_token_seconds",
            "time_to_first_token_seconds",
        )
        for end in ("bucket", "count", "sum")
    ),
}

# What the endpoint picker of the Gateway API Inference Extension reads, and the labels it looks at.
GATEWAY: Mapping[str, set[str]] = {
    "vllm:num_requests_waiting": set(),
    "vllm:num_requests_running": set(),
    "vllm:kv_cache_usage_perc": set(),
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
    "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
}


def ttft_policy(model: str) -> str:
    """The query of Ray's autoscaling policy by time to first token, for one model."""
    rate = f'rate(ray_vllm_time_to_first_token_seconds_bucket{{model_name="{model}"}}[1m])'
    return f"histogram_quantile(0.99, sum by (le) ({rate}))"


def ray_dashboard(interval: str = "1m") -> dict[str, str]:
    """The queries of the installed Ray's own Serve LLM dashboard by panel, for all models, workers and deployments,
    but for those of features that are not here."""
    queries = {}
    for row in serve_llm_dashboard_config.rows:
        for panel in row.panels:
            for number, target in enumerate(panel.targets):
                query = target.expr.format(global_filters="").replace("$interval", interval)
                query = re.sub(r'"\$\w+"', '".*"', query)
                if not _OTHER_FEATURES.search(query):
                    queries[f"{row.title} / {panel.title} / {number}"] = query
    return queries


def names_in(query: str) -> set[str]:
    """The metrics that a PromQL query names. They must have braces or a range."""
    return set(_NAME.findall(re.sub(r'"[^"]*"', '""', query)))
