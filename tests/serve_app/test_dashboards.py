"""The dashboard and the alerts in cluster/deploy name only metrics and labels that exist, and alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.metrics.definitions import DEFINITIONS
from tests.serve_app.consumers import names_in

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "cluster" / "deploy"
DASHBOARD = DEPLOY / "grafana" / "qwen3-dist.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
OF_REPLICAS, OF_INGRESSES = {"model_name", "engine", "replica"}, {"ingress"}
ADDED = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def labels_of() -> dict[str, set[str]]:
    """The labels of each series that the service tells, under vLLM's prefix."""
    found = {}
    for each in DEFINITIONS:
        common: set[str] = (
            OF_INGRESSES
            if each.name.startswith(("http_", "sequences_", "replicas_", "request_replica"))
            else OF_REPLICAS
        )
        for end in ADDED[each.kind]:
            bound = {"le"} if end == "_bucket" else set()
            found[each.full_name("vllm") + end] = common | set(each.labels) | bound
    return found


def alert_rules() -> dict[str, dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def queries() -> dict[str, str]:
    """All queries of ours by where they stand."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = {name: rule["expr"] for name, rule in alert_rules().items()}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found[f"${variable['name']}"] = variable["definition"]
    return found


@pytest.mark.parametrize("place", sorted(queries()))
def test_a_query_names_only_series_and_labels_that_exist(place: str) -> None:
    query, known = queries()[place], labels_of()
    named = names_in(query)
    assert named and named <= set(known), named - set(known)
    asked = set(re.findall(r"(\w+)\s*=~?\s*\"", query))
    for group in re.findall(r"\bby \(([^)]*)\)", query):
        asked |= {label.strip() for label in group.split(",")}
    assert all(asked <= known[name] for name in named), asked


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for query in queries().values() for name in names_in(query)}
    for each in DEFINITIONS:
        if each.own and each.name not in ("last_step_sequences", "last_step_tokens"):  # of one moment
            assert any(each.full_name("vllm") + end in shown for end in ADDED[each.kind]), each.name


def test_the_dashboard_is_what_its_table_says() -> None:
    command = [sys.executable, "tools/grafana_dashboard.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == DASHBOARD.read_text(), "run python tools/grafana_dashboard.py > " + str(DASHBOARD)


def test_panels_have_places_of_their_own_and_legends_that_tell_series_apart() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel.get("targets", []):
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.match(r"(?:\d+ \* )?sum by \(([^)]*)\)", target["expr"])
            if grouped:
                assert used == {label.strip() for label in grouped[1].split(",")}, panel["title"]


def test_every_alert_says_what_happens_and_what_to_do() -> None:
    for name, rule in alert_rules().items():
        assert set(rule["annotations"]) == {"summary", "action"}, name
        assert rule["labels"]["severity"] in ("warning", "critical"), name


@pytest.fixture
def promtool() -> Callable[..., str]:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is missing; Debian's package prometheus has it. Names are checked without it")

    def run(*arguments: str) -> str:
        done = subprocess.run([path, *arguments], cwd=ALERTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_promtool_takes_the_rules_and_the_configuration(promtool: Callable[..., str]) -> None:
    assert f"{len(alert_rules())} rules found" in promtool("check", "rules", ALERTS.name)
    promtool("check", "config", "prometheus.yml")


# The series that make an alert fire within 20 minutes, a sample a minute, in promtool's notation.
FIRING = {
    "SlowFirstToken": {
        'vllm:time_to_first_token_seconds_bucket{le="10.0"}': "0x20",
        'vllm:time_to_first_token_seconds_bucket{le="20.0"}': "0+9x20",
        'vllm:time_to_first_token_seconds_bucket{le="+Inf"}': "0+9x20",
    },
    "KvCacheNearlyFull": {'vllm:kv_cache_usage_perc{replica="r"}': "0.95x20"},
    "RequestsWait": {'vllm:num_requests_waiting{replica="r"}': "11x20"},
    "Preemptions": {'vllm:num_preemptions_total{replica="r"}': "0+60x20"},
    "RanksAbsent": {'qwen3_dist:ranks_absent{replica="r"}': "2x20"},
    "ServerErrors": {
        'qwen3_dist:http_requests_total{status="200"}': "0+90x20",
        'qwen3_dist:http_requests_total{status="503"}': "0+10x20",
    },
    "FailedRequests": {
        'vllm:request_success_total{finished_reason="stop"}': "0+90x20",
        'vllm:request_success_total{finished_reason="error"}': "0+10x20",
    },
    "ReplicaRestarted": {"qwen3_dist:replicas_lost_total": "0x10 1x10"},
    "NoReplica": {"qwen3_dist:replicas_healthy": "0x20"},
    "StalledStep": {'qwen3_dist:step_age_seconds{replica="r"}': "61x20"},
}
# Those of a service that is well and busy.
QUIET = {
    'vllm:time_to_first_token_seconds_bucket{le="10.0"}': "0+900x20",
    'vllm:time_to_first_token_seconds_bucket{le="20.0"}': "0+900x20",
    'vllm:time_to_first_token_seconds_bucket{le="+Inf"}': "0+900x20",
    'vllm:kv_cache_usage_perc{replica="r"}': "0.85x20",
    'vllm:num_requests_waiting{replica="r"}': "0 20 20 9 20 20 20 3 20 20 20 5 20 20 20 8 20 20 20 9 20",
    'vllm:num_preemptions_total{replica="r"}': "0+1x20",
    'qwen3_dist:http_requests_total{status="200"}': "0+900x20",
    'qwen3_dist:http_requests_total{status="503"}': "0+1x20",
    'vllm:request_success_total{finished_reason="stop"}': "0+900x20",
    'vllm:request_success_total{finished_reason="error"}': "0+1x20",
    'qwen3_dist:ranks_absent{replica="r"}': "0 2 2 2 0 2 2 2 0 2 2 2 0 2 2 2 0 2 2 2 0",
    "qwen3_dist:replicas_lost_total": "3x20",
    "qwen3_dist:replicas_healthy": "1x20",
    'qwen3_dist:step_age_seconds{replica="r"}': "50x20",
}


def fires(promtool: Callable[..., str], tmp_path: Path, name: str, series: dict[str, str]) -> bool:
    """Whether alert `name` fires with `series` at minute 20."""
    case = {
        "rule_files": [str(ALERTS)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": key, "values": values} for key, values in series.items()],
                "alert_rule_test": [{"eval_time": "20m", "alertname": name, "exp_alerts": []}],
            }
        ],
    }
    file = tmp_path / "case.yml"
    file.write_text(yaml.safe_dump(case))
    try:
        promtool("test", "rules", str(file))
    except AssertionError as error:
        assert "alertname" in str(error), error
        return True
    return False


def test_every_alert_has_a_case() -> None:
    assert set(FIRING) == set(alert_rules())


@pytest.mark.parametrize("name", FIRING)
def test_an_alert_fires_when_it_should_and_not_before(
    promtool: Callable[..., str], tmp_path: Path, name: str
) -> None:
    assert fires(promtool, tmp_path, name, FIRING[name])
    assert not fires(promtool, tmp_path, name, QUIET)
