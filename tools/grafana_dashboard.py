"""Prints the Grafana dashboard of the service from a table of its panels.

python tools/grafana_dashboard.py > cluster/deploy/grafana/qwen3-dist.json
"""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]
Row = tuple[str, list["Panel"]]
Panel = tuple[str, str, dict[str, str]]  # its title, its unit, and its queries by legend

OF = '{model_name=~"$model", replica=~"$replica"}'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


def quantiles(metric: str) -> dict[str, str]:
    rate = f"sum by (le) (rate({metric}_bucket{OF}[$__rate_interval]))"
    return {f"p{q:g}": f"histogram_quantile({q / 100:g}, {rate})" for q in (50, 90, 99)}


def rate(metric: str, by: str = "", of: str = OF) -> str:
    grouped = f"sum by ({by}) " if by else "sum "
    return f"{grouped}(rate({metric}{of}[$__rate_interval]))"


def ratio(over: str, under: str) -> str:
    return f"{rate(over)} / {rate(under)}"


ROWS: list[Row] = [
    (
        "Latency",
        [
            ("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds")),
            ("Inter-token latency", "s", quantiles("vllm:inter_token_latency_seconds")),
            ("End-to-end latency", "s", quantiles("vllm:e2e_request_latency_seconds")),
            ("Time in queue", "s", quantiles("vllm:request_queue_time_seconds")),
            ("Prefill time", "s", quantiles("vllm:request_prefill_time_seconds")),
            ("Decode time", "s", quantiles("vllm:request_decode_time_seconds")),
        ],
    ),
    (
        "Throughput",
        [
            (
                "Tokens",
                "tokens/s",
                {
                    "prompt": rate("vllm:prompt_tokens_total"),
                    "generated": rate("vllm:generation_tokens_total"),
                },
            ),
            (
                "Requests by finish reason",
                "reqps",
                {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason")},
            ),
            (
                "Mean tokens of a request",
                "short",
                {
                    kind: ratio(f"vllm:request_{kind}_tokens_sum", f"vllm:request_{kind}_tokens_count")
                    for kind in ("prompt", "generation")
                },
            ),
        ],
    ),
    (
        "Engines",
        [
            (
                "Requests",
                "short",
                {
                    "running, {{replica}}": f"vllm:num_requests_running{OF}",
                    "waiting, {{replica}}": f"vllm:num_requests_waiting{OF}",
                },
            ),
            ("KV cache in use", "percentunit", {"{{replica}}": f"vllm:kv_cache_usage_perc{OF}"}),
            (
                "Prefix cache hit rate",
                "percentunit",
                {"hits": ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")},
            ),
            ("Preemptions", "ops", {"{{replica}}": rate("vllm:num_preemptions_total", "replica")}),
            (
                "Draft tokens accepted",
                "percentunit",
                {
                    "accepted": ratio(
                        "vllm:spec_decode_num_accepted_tokens_total",
                        "vllm:spec_decode_num_draft_tokens_total",
                    )
                },
            ),
            (
                "Adapters",
                "dateTimeAsIso",
                {
                    "runs {{running_lora_adapters}}, waits {{waiting_lora_adapters}}": (
                        f"1000 * vllm:lora_requests_info{OF}"
                    )
                },
            ),
        ],
    ),
    (
        "Steps and ranks",
        [
            ("Steps", "ops", {"{{replica}}": rate("qwen3_dist:steps_total", "replica")}),
            (
                "Mean size of a step",
                "short",
                {
                    "sequences": ratio("qwen3_dist:step_sequences_total", "qwen3_dist:steps_total"),
                    "tokens": ratio("qwen3_dist:step_tokens_total", "qwen3_dist:steps_total"),
                },
            ),
            ("Age of the step in flight", "s", {"{{replica}}": f"qwen3_dist:step_age_seconds{OF}"}),
            (
                "Ranks have no step: they wait for",
                "percentunit",
                {
                    "{{waits_for}}, {{replica}}": rate(
                        "qwen3_dist:rank_wait_seconds_total", "waits_for, replica"
                    )
                },
            ),
            (
                "Ranks' own part of steps: others wait for the longest",
                "percentunit",
                {"rank {{rank}}, {{replica}}": rate("qwen3_dist:rank_own_seconds_total", "rank, replica")},
            ),
            ("Bytes between ranks", "Bps", {"{{exchange}}": rate("qwen3_dist:wire_bytes_total", "exchange")}),
            (
                "Tokens dispatched to experts",
                "tokens/s",
                {"tokens": rate("qwen3_dist:dispatched_tokens_total")},
            ),
            (
                "Expert imbalance by layer",
                "short",
                {"layer {{layer}}, {{replica}}": f"qwen3_dist:expert_imbalance{OF}"},
            ),
            ("Steps run again", "ops", {"{{replica}}": rate("qwen3_dist:repeated_steps_total", "replica")}),
        ],
    ),
    (
        "HTTP and replicas",
        [
            (
                "HTTP requests",
                "reqps",
                {"{{route}} {{status}}": rate("qwen3_dist:http_requests_total", "route, status", "{}")},
            ),
            ("Refused", "reqps", {"{{reason}}": rate("qwen3_dist:http_refused_total", "reason", "{}")}),
            (
                "In flight",
                "short",
                {
                    "requests": "sum (qwen3_dist:http_requests_in_flight{})",
                    "streams": "sum (qwen3_dist:http_streams_in_flight{})",
                    "sequences": "sum (qwen3_dist:sequences_in_flight{})",
                    "limit of sequences": "sum (qwen3_dist:sequences_limit{})",
                },
            ),
            (
                "Replicas",
                "short",
                {
                    "healthy, {{model_name}}": "max by (model_name) (qwen3_dist:replicas_healthy{})",
                    "lost in an hour, {{model_name}}": (
                        "max by (model_name) (increase(qwen3_dist:replicas_lost_total{}[1h]))"
                    ),
                    "ranks replaced in an hour, {{model_name}}": (
                        "sum by (model_name) (increase(qwen3_dist:rank_replacements_total{}[1h]))"
                    ),
                    "ranks absent, {{model_name}}": "sum by (model_name) (qwen3_dist:ranks_absent{})",
                    "silent in an hour": "sum (increase(qwen3_dist:replicas_silent_total{}[1h]))",
                },
            ),
            (
                "Replicas by version of their weights",
                "short",
                {
                    "{{model_name}} {{version}}": f"count by (model_name, version) (qwen3_dist:weights_info{OF})"
                },
            ),
            (
                "Requests that lost their replica",
                "reqps",
                {"requests": rate("qwen3_dist:request_replica_losses_total", of="{}")},
            ),
        ],
    ),
]


def panel(number: int, x: int, y: int, described: Panel) -> Json:
    title, unit, queries = described
    targets = [
        {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
        for index, (legend, query) in enumerate(queries.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": targets,
    }


def panels() -> list[Json]:
    made: list[Json] = []
    y = 0
    for title, row in ROWS:
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": title, "gridPos": place, "collapsed": False}
        )
        y += 1
        for index, described in enumerate(row):
            across, down = index % (_COLUMNS // _WIDTH), index // (_COLUMNS // _WIDTH)
            made.append(panel(len(made) + 1, across * _WIDTH, y + down * _HEIGHT, described))
        y += -(-len(row) * _WIDTH // _COLUMNS) * _HEIGHT
    return made


def variable(name: str, query: str) -> Json:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": query, "refId": name},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def dashboard() -> Json:
    return {
        "uid": "qwen3-dist",
        "title": "qwen3_dist",
        "tags": ["llm", "qwen3"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                variable("model", "label_values(vllm:num_requests_running{}, model_name)"),
                variable("replica", 'label_values(vllm:num_requests_running{model_name=~"$model"}, replica)'),
            ]
        },
        "panels": panels(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
