"""A service's YAML file: several models, what the command line overrides, and where each setting comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_dist.errors import ConfigError
from serve_app.cli import main
from serve_app.launch.deploy import changes
from serve_app.launch.schema import serve_schema
from serve_app.settings import read_service_config
from serve_app.settings.file import service_source

FILE = """\
host: 0.0.0.0
api_key: very secret
max_model_len: 512
models:
  - {model: bundled, layout: "tp=2", max_replicas: 3}
  - model: bundled
    model_name: second
    max_model_len: 256
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "service.yaml").write_text(FILE)
    return tmp_path / "service.yaml"


def test_models_have_what_stands_beside_the_list_and_their_own_over_it(file: Path) -> None:
    config = service_source(file, {}).read()
    first, second = config.models
    assert (first.name, second.name) == ("qwen3-bundled", "second")
    assert [model.replica.engine.max_model_len for model in config.models] == [512, 256]
    assert (first.scaling.max_replicas, second.scaling.max_replicas) == (3, 1)
    assert config.endpoint.host == "0.0.0.0"


def test_the_command_line_wins_for_all_models(file: Path) -> None:
    config = service_source(file, {"max_model_len": "128", "port": "9000"}).read()
    assert [model.replica.engine.max_model_len for model in config.models] == [128, 128]
    assert config.endpoint.port == 9000


def test_every_setting_tells_its_source_and_no_secret(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", str(file), "--port", "9000", "--changed", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sources = {(each["model"], each["name"]): each["source"] for each in told}
    assert sources["", "host"] == f"{file}:1"
    assert sources["", "port"] == "command line"
    assert sources["qwen3-bundled", "max_model_len"] == f"{file}:3"
    assert sources["qwen3-bundled", "max_replicas"] == f"{file}:5"
    assert sources["second", "max_model_len"] == f"{file}:8"
    assert "very secret" not in json.dumps(told)


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("host:", "hots:", 1, "unknown setting 'hots'; did you mean host?"),
        ("max_replicas: 3", "max_replica: 3", 5, "unknown setting 'max_replica'; did you mean max_replicas?"),
        ("max_replicas: 3", "max_replicas: many", 5, "max_replicas must be a whole number, not 'many'"),
        ("max_replicas: 3", "port: 1", 5, "port is a setting of the service, not of a model"),
        ("    max_model_len: 256", "    max_model_len: 0", 8, "max_model_len must be positive, not 0"),
        ("    model_name: second\n", "", 6, "two models or adapters are called 'qwen3-bundled'"),
        (
            "model_name: second",
            "model_name: qwen3/bundled",
            6,
            "'qwen3-bundled' and 'qwen3/bundled' differ only",
        ),
        ("host: 0.0.0.0", "host: [a]", 1, "host must be text, not ['a']"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_reason(
    file: Path, old: str, new: str, line: int, reason: str
) -> None:
    assert old in FILE
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        service_source(file, {}).read()
    assert str(refused.value).startswith(f"{file}:{line}: ") and reason in str(refused.value)


def test_a_wrong_option_is_not_blamed_on_the_file(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        service_source(file, {"max_replicas": "many"}).read()
    assert str(refused.value) == "max_replicas must be a whole number, not 'many'"


def test_a_model_beside_a_list_of_models_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="leave MODEL out"):
        service_source(file, {"model": "bundled"}).read()


def kinds(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[str, tuple[str, ...]]]:
    deployed = {app["name"]: app for app in serve_schema(read_service_config(before))["applications"]}
    schema = serve_schema(read_service_config(after))
    return {each.application: (each.kind, each.settings) for each in changes(schema, deployed, "qwen3_dist")}


GATE, MODEL = "qwen3_dist", "qwen3_dist--qwen3-bundled"


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": "k"},
        {"max_queued_requests": 7},
        {"request_timeout_s": 3},
        {"max_replicas": 2},
        {"ingress_replicas": 2},
        {"max_ingress_replicas": 3},
        {"max_ingress_replicas": 3, "ingress_target_requests": 9},
    ],
)
def test_what_is_told_to_a_running_service_reloads_no_model(settings: dict[str, object]) -> None:
    told = kinds({}, settings)
    assert told[GATE][0] == "updated" or told[MODEL][0] == "updated"
    assert all(kind in ("updated", "unchanged") for kind, _ in told.values())


def test_what_a_replica_is_built_with_reloads_its_model_alone() -> None:
    second = {"model_name": "second"}
    before = {"models": [{}, second]}
    told = kinds(before, {"models": [{"layout": "tp=2"}, second]})
    assert told == {
        GATE: ("unchanged", ()),
        MODEL: ("reloaded", ("layout",)),
        "qwen3_dist--second": ("unchanged", ()),
    }
    assert kinds(before, {"models": [{}]})["qwen3_dist--second"] == ("removed", ())
    assert kinds({"models": [{}]}, before)["qwen3_dist--second"] == ("new", ())
