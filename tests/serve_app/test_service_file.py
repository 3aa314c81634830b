"""A service's YAML file: several models, what the command line overrides, and where each setting comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_dist.errors import ConfigError
from serve_app.cli import main
from serve_app.launch.deploy import changes, describe
from serve_app.launch.schema import serve_schema
from serve_app.settings import read_service_config
from serve_app.settings.file import service_source
from tests.checkpoints import DENSE, MOE
from tests.serve_app.command_line import refusal

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
        ("host: 0.0.0.0", "host: ''", 1, "host must be an address; 0.0.0.0 is every interface"),
        ('layout: "tp=2"', 'layout: "tp=2,ep=4"', 5, "ep=4 does not divide dp*tp=2; ep=1, 2 work"),
        (
            "max_model_len: 512",
            "layout: {tp: 2}",
            3,
            "layout must be text such as tp=2,ep=2, not {'tp': '2'}",
        ),
        ("max_model_len: 512", "lora: [nothing]", 3, "lora"),
        ("max_model_len: 512", "{{ length }}: 1", 3, "this is no name of a setting; if it is a template"),
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


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("tensor_parallel_size: 2", "tensor_parallel_size is vLLM's name; write layout: tp=N"),
        ("data-parallel-size: 2", "data-parallel-size is vLLM's name; write layout: dp=N"),
        ("enable_expert_parallel: true", "write the expert-parallel size into the layout"),
        ("served_model_name: a", "served_model_name is vLLM's name; write model_name"),
        ("enforce_eager: true", "enforce_eager is vLLM's name; write cuda_graphs: false"),
        ("trust_remote_code: true", "leave it out, since no code of a checkpoint is run"),
        ("xyzzy: 1", "unknown setting 'xyzzy'; known are "),
    ],
)
def test_vllms_name_of_a_setting_is_answered_with_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, advice: str
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(f"model: bundled\n{setting}\n")
    line = refusal(capsys, "config", "--config", str(file))
    assert line.startswith(f"qwen3-dist: {file}:2: ") and advice in line


def test_a_wrong_option_is_not_blamed_on_the_file(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        service_source(file, {"max_replicas": "many"}).read()
    assert str(refused.value) == "max_replicas must be a whole number, not 'many'"


def test_a_model_beside_a_list_of_models_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="leave MODEL out"):
        service_source(file, {"model": "bundled"}).read()


@pytest.mark.parametrize(
    ("text", "place", "advice"),
    [
        ("models:\n\t- model: a\n", "2:1", "put spaces in place of the tab"),
        ("port: 1\nhost:0.0.0.0\n", "2:5", "put a space after the colon"),
        ("host:0.0.0.0\nport: 1\n", "1:5", "put a space after the colon"),
        ("host:0.0.0.0\n", "1:5", "put a space after the colon"),
        ("port: 1\nlayout\nhost: a\n", "2:1", "write `name: value`, with a colon and a space"),
        ("host: a\n  port: 1\n", "2:7", "indent the line as far as the one above"),
        ("model_name: a: b\n", "1:14", "put quotes around the value that has a colon in it"),
        ("models:\n  - model: a\n   port: 1\n", "3:4", "indent the line as far as the others of its mapping"),
        ('host: "a\nport: 1\n', "1:7", "close the quote that begins here"),
        ("models: [a, b\nport: 1\n", "1:9", "close the [ that begins here with ]"),
        ("models: {a: b\nport: 1\n", "1:9", "close the { that begins here with }"),
        ("lora: {a: b}}\n", "1:13", "remove the bracket that closes nothing"),
        ("api_key: @x\n", "1:10", "put quotes around the value that begins with @"),
        ("cors_allow_origins: *\n", "1:21", "put quotes around the value that begins with * or &"),
        ("host: 'a' b\n", "1:11", "put quotes around the whole value"),
        ("port: 1\n---\nport: 2\n", "2:1", "keep one document"),
        ("host: a\x07\n", "1:8", "remove the control character U+0007"),
        ('host: "\\w"\n', "1:9", "use single quotes, in which a backslash is a plain character"),
        ("models:\n  -model: a\n", "2", "put a space after the dash of -model"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_with_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, place: str, advice: str
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(text)
    line = refusal(capsys, "config", "--config", str(file))
    assert line.startswith(f"qwen3-dist: {file}:{place}: ") and advice in line


def checkpoint(folder: Path, **config: object) -> str:
    (folder / "config.json").write_text(json.dumps({**DENSE, "model_type": "qwen3", **config}))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({}, ["--layout", "tp=3"], "n_heads=8 is not divisible by tp=3"),
        ({}, ["--layout", "tp=2,ep=2"], "ep=2 needs a MoE checkpoint"),
        ({**MOE, "model_type": "qwen3_moe"}, ["--layout", "dp=16,ep=16"], "ep=16 is more than num_experts=8"),
        ({}, ["--max-model-len", "999999"], "exceeds the model's context"),
        ({}, ["--lora", "a=/no/such/adapter"], "/no/such/adapter"),
    ],
)
def test_config_refuses_what_serve_refuses_of_a_model(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, object],
    options: list[str],
    words: str,
) -> None:
    model = checkpoint(tmp_path, **config)
    assert main(["config", model]) == 0 and not capsys.readouterr().err
    line = refusal(capsys, "config", model, *options)
    assert words in line and line == refusal(capsys, "serve", model, *options)


def test_of_several_models_the_one_that_does_not_fit_is_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE + "    layout: tp=3\n")
    line = refusal(capsys, "config", "--config", str(file))
    assert line.startswith(f"qwen3-dist: {file}:9: second: n_heads=8 is not divisible by tp=3")
    assert line == refusal(capsys, "serve", "--config", str(file))


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("max_model_len: 512", "layout: tp=3", 3, "n_heads=8 is not divisible by tp=3"),
        ("max_model_len: 512", "max_model_len: 99999", 3, "max_model_len=99999 exceeds the model's context"),
        ("max_model_len: 256", "lora: {a: /no/such/adapter}", 8, "/no/such/adapter"),
        ('layout: "tp=2"', "engine: {layout: tp=3}", 5, "n_heads=8 is not divisible by tp=3"),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_told_with_its_line(
    file: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, words: str
) -> None:
    file.write_text(FILE.replace(old, new))
    told = refusal(capsys, "config", "--config", str(file))
    assert told.startswith(f"qwen3-dist: {file}:{line}: ") and words in told
    assert told == refusal(capsys, "serve", "--config", str(file))


def test_a_layout_of_the_command_line_is_not_blamed_on_the_file(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(capsys, "config", "--config", str(file), "--layout", "tp=3")
    assert told.startswith("qwen3-dist: qwen3-bundled: n_heads=8 is not divisible by tp=3")


def test_a_keys_file_that_cannot_be_used_is_told_with_the_line_that_names_it(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.yaml"
    file.write_text(FILE.replace("api_key: very secret", f"keys_file: {keys}"))
    start = f"qwen3-dist: {file}:2: the keys_file cannot be used: {keys}"
    told = refusal(capsys, "config", "--config", str(file))
    assert told.startswith(f"{start} cannot be read (No such file or directory)")
    assert told == refusal(capsys, "serve", "--config", str(file))
    keys.write_text("keys:\n  - {name: a, kee: good}\n")
    assert refusal(capsys, "config", "--config", str(file)).startswith(f"{start}:2: unknown setting")
    keys.write_text("keys:\n  - {name: a, key: good}\n")
    assert main(["config", "--config", str(file)]) == 0


def test_config_says_which_models_it_could_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "/no/such/model is neither a directory" in refusal(capsys, "config", "/no/such/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the hub was asked"))
    assert main(["config", "org/model", "--layout", "tp=3", "--json"]) == 0
    assert "org/model was not checked" in capsys.readouterr().err
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("a" * 40)
    checkpoint(snapshot)
    assert "is not divisible by tp=3" in refusal(capsys, "config", "org/model", "--layout", "tp=3")


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


def test_what_failed_is_deployed_again_even_if_nothing_changed() -> None:
    schema = serve_schema(read_service_config({}))
    deployed = {app["name"]: app for app in schema["applications"]}
    found = changes(schema, deployed, "qwen3_dist", failed={GATE})
    assert [(each.application, each.kind) for each in found] == [(GATE, "failed"), (MODEL, "unchanged")]
    assert "starts again" in describe(found[0])
