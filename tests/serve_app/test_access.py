"""API keys, without a server: who is let in, and the file of keys."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from fastapi import Request

from qwen3_dist.errors import ConfigError
from serve_app.cli import main
from serve_app.ingress.access.control import key_name
from serve_app.settings import IngressSettings, ServiceConfig, read_service_config
from serve_app.settings.file import service_source
from serve_app.settings.keys import hash_of, read_keys
from tests.serve_app.gate import access, request, status_of

REBALANCE = "/v1/cluster/experts/rebalance"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    file.write_text(
        "keys:\n"
        "  - {name: alice, key: key of alice}\n"
        f"  - {{name: ops, key: '{hash_of('key of ops')}', admin: true}}\n"
    )
    return file


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer key"}, {"authorization": "bearer  key"}, {"x_api_key": "key"}]
)
def test_a_key_is_shown_as_openais_clients_do_or_as_anthropics_do(headers: dict[str, str]) -> None:
    assert status_of(access(api_key="key"), request(**headers)) == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer ke"}, {"authorization": "key"}, {"x_api_key": "clé"}]
)
@pytest.mark.parametrize("prefix", ["", "/second"])
def test_a_missing_or_wrong_key_is_401(headers: dict[str, str], prefix: str) -> None:
    assert status_of(access(api_key="key"), request(prefix=prefix, **headers)) == 401


def test_no_key_is_asked_for_where_none_is_set_nor_for_health_and_version() -> None:
    assert status_of(access(), request()) == 200
    for path in ("/health", "/version"):
        for prefix in ("", "/second"):
            assert status_of(access(api_key="key"), request(path, prefix=prefix)) == 200


@pytest.mark.parametrize(
    "path", ["/tokenize", "/detokenize", "/docs", "/openapi.json", "/health/x", "/page", "/x"]
)
def test_all_other_paths_ask_for_the_key(path: str) -> None:
    assert status_of(access(api_key="key"), request(path)) == 401
    assert status_of(access(api_key="key"), request(path, x_api_key="key")) == 200


@pytest.mark.parametrize(
    ("admin_key", "api_key", "shown", "status"),
    [
        ("", "", "", 200),
        ("", "key", "key", 403),
        ("admin", "key", "key", 403),
        ("admin", "key", "", 401),
        ("admin", "", "", 401),
        ("admin", "", "admin", 200),
        ("admin", "key", "admin", 200),
    ],
)
def test_what_changes_the_service_needs_the_admin_key_once_any_key_is_set(
    admin_key: str, api_key: str, shown: str, status: int
) -> None:
    found = access(admin_key=admin_key, api_key=api_key)
    assert status_of(found, request(REBALANCE, x_api_key=shown)) == status
    assert status_of(found, request("/v1/cluster/anything/else", x_api_key=shown)) == status


def test_metrics_need_an_admin_key_if_wanted() -> None:
    def asked(shown: str = "") -> Request:
        return request("/metrics", "GET", x_api_key=shown)

    found = access(api_key="key", admin_key="admin", admin_metrics=True)
    assert [status_of(found, asked(shown)) for shown in ("", "key", "admin")] == [401, 403, 200]


def test_keys_of_a_file_have_names_and_rights(keys_file: Path) -> None:
    found = access(keys_file=str(keys_file))
    assert status_of(found, request()) == 401
    for key, name, status in (("key of alice", "alice", 403), ("key of ops", "ops", 200)):
        asked = request(x_api_key=key)
        assert (status_of(found, asked), key_name(asked)) == (200, name)
        assert status_of(found, request(REBALANCE, x_api_key=key)) == status


def test_the_key_of_the_settings_has_the_settings_name() -> None:
    found = access(api_key="key", admin_key="admin")
    for key, name in (("key", "api_key"), ("admin", "admin_key")):
        asked = request(x_api_key=key)
        found.check(asked)
        assert key_name(asked) == name
    assert key_name(request()) == ""


def test_a_hash_is_no_key(keys_file: Path) -> None:
    """Hashes are visible in Serve's status."""
    found = access(keys_file=str(keys_file), api_key=hash_of("key"))
    assert status_of(found, request(x_api_key="key")) == 200
    for key in ("key", "key of alice", "key of ops"):
        assert status_of(found, request(x_api_key=hash_of(key))) == 401


def test_a_changed_file_is_read_again(keys_file: Path) -> None:
    found = access(keys_file=str(keys_file))
    keys_file.write_text("keys:\n  - {name: bob, key: key of bob}\n")
    assert status_of(found, request(x_api_key="key of bob")) == 401
    found.reload()
    assert status_of(found, request(x_api_key="key of bob")) == 200
    assert status_of(found, request(x_api_key="key of alice")) == 401
    keys_file.write_text("keys: []\n")
    found.reload()
    assert status_of(found, request(x_api_key="key of bob")) == 401


def test_a_file_that_is_replaced_within_a_tick_of_its_clock_is_read_again(keys_file: Path) -> None:
    found = access(keys_file=str(keys_file))
    before = keys_file.stat()
    other = keys_file.with_suffix(".new")
    other.write_text(keys_file.read_text().replace("key of alice", "key of alisa"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(keys_file)
    found.reload()
    assert status_of(found, request(x_api_key="key of alisa")) == 200


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("keys:\n  - {name: a, key: x\n", r"keys.yaml:2:5: this is not valid YAML; close the {"),
        ("keys:\n  - {name: a, key: x, limit: 3}\n", r"keys.yaml:2: unknown setting 'keys.0.limit'"),
        ("keys:\n  - name: a\n", r"keys.yaml:2: .*key of 'a' must be a key"),
        ("keys:\n  - name: a\n    key: sha256:12\n", r"keys.yaml:3: .*key must have 64 digits"),
        ("keys:\n  - {name: a, key: x}\n  - {name: a, key: y}\n", "two entries with one name: a and a"),
        ("keys:\n  - {name: a, key: x}\n  - {name: b, key: x}\n", "two entries with one key: a and b"),
        ("keys:\n  - {name: api_key, key: x}\n", "must not use the name api_key"),
        ("keys:\n  - {name: a, key: x, requests_per_minute: 0}\n", "requests_per_minute must be positive"),
        ("{}\n", "keys.yaml:1: .*'keys' is required"),
    ],
)
def test_a_broken_file_keeps_the_old_keys_and_its_line_is_logged(
    keys_file: Path, text: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = access(keys_file=str(keys_file))
    keys_file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_keys(str(keys_file))
    serve_log = logging.getLogger("ray.serve")
    serve_log.addHandler(caplog.handler)
    try:
        found.reload()
        found.reload()
    finally:
        serve_log.removeHandler(caplog.handler)
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once
    assert str(keys_file) in caplog.text
    assert status_of(found, request(x_api_key="key of alice")) == 200


def test_a_missing_file_is_refused_at_the_start_and_later_keeps_the_keys(keys_file: Path) -> None:
    found = access(keys_file=str(keys_file))
    keys_file.unlink()
    found.reload()
    assert status_of(found, request(x_api_key="key of alice")) == 200
    with pytest.raises(ConfigError, match="cannot be read"):
        access(keys_file=str(keys_file))


def test_the_ingress_is_told_no_key_but_its_hash() -> None:
    config = read_service_config({"api_key": "very secret", "admin_key": "more secret"})
    assert config.ingress.api_key == "very secret"
    told = json.dumps(config.ingress_config().to_json())
    assert "secret" not in told
    assert hash_of("very secret") in told and hash_of("more secret") in told
    assert "secret" not in repr(config)
    assert ServiceConfig().ingress_config().settings.api_key == ""


def test_a_hash_that_is_cut_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="api_key must have 64 digits"):
        IngressSettings(api_key=hash_of("key")[:-1])


def test_a_new_key_and_its_entry_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "alice", "--admin"]) == 0
    key, _, entry = capsys.readouterr().out.strip().split("\n", 2)
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{entry}\n")
    [read] = read_keys(str(file))
    assert (read.name, read.key, read.admin) == ("alice", hash_of(key), True) and len(key) > 40
    assert main(["keys", "check", str(file)]) == 0
    assert capsys.readouterr().out == "alice (admin)\n"
    file.write_text("keys: 3\n")
    assert main(["keys", "check", str(file)]) == 2
    assert f"{file}:1: keys must be a list" in capsys.readouterr().err


def test_keys_in_the_environment_win_over_the_file_and_lose_to_options(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("api_key: of the file\nadmin_key: of the file\n")
    environment = {"QWEN3_DIST_API_KEY": "of the environment", "QWEN3_DIST_ADMIN_KEY": ""}
    source = service_source(file, {}, environment)
    config = source.read()
    assert (config.ingress.api_key, config.ingress.admin_key) == ("of the environment", "of the file")
    shown = {each.name: each for each in source.effective(config)}
    assert (shown["api_key"].value, shown["api_key"].source) == ("(secret)", "environment")
    given = service_source(file, {"api_key": "of the option"}, environment).read()
    assert given.ingress.api_key == "of the option"


@pytest.mark.parametrize("settings", [["--api-key", hash_of("key")], ["--keys-file", "keys.yaml"]])
def test_a_sample_needs_a_key_that_it_can_send(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN3_DIST_API_KEY", raising=False)
    assert main(["serve", "--sample", *settings]) == 2
    assert "--sample needs the key itself" in capsys.readouterr().err
