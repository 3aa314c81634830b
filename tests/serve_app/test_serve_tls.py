"""HTTPS with a certificate that signs itself, and a key from the environment."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from qwen3_dist.errors import ConfigError
from serve_app.launch.checks import check_files
from serve_app.launch.schema import serve_schema
from serve_app.launch.startup import base_url, own_tls
from serve_app.settings import read_service_config
from tests.serve_app.support import free_port, wait_for


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for 127.0.0.1 and its key, as settings."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "service.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (folder / "locked.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


def test_the_certificate_reaches_serves_options_and_the_url(files: dict[str, str]) -> None:
    config = read_service_config(files)
    check_files(config)
    assert serve_schema(config)["http_options"].items() >= files.items()
    assert base_url(config.endpoint) == "https://127.0.0.1:8000"
    plain = read_service_config({})
    assert base_url(plain.endpoint) == "http://127.0.0.1:8000" and own_tls(plain.endpoint) is None
    assert not {"ssl_certfile", "ssl_keyfile"} & set(serve_schema(plain)["http_options"])


def test_a_client_here_trusts_the_services_certificate_alone_where_it_can_read_it(
    files: dict[str, str],
) -> None:
    tls = own_tls(read_service_config(files).endpoint)
    assert tls is not None and tls.verify_mode == ssl.CERT_REQUIRED
    elsewhere = own_tls(read_service_config({**files, "ssl_certfile": "/nowhere/cert.pem"}).endpoint)
    assert elsewhere is not None and elsewhere.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"ssl_certfile": "/nowhere/cert.pem"}, "No such file"),
        ({"ssl_keyfile": "locked.pem"}, "ssl_keyfile has a password"),
        ({"ssl_keyfile": "cert.pem"}, "cannot be used"),
        ({"ssl_keyfile": ""}, "ssl_certfile needs ssl_keyfile"),
        ({"keys_file": "/nowhere/keys.yaml"}, "keys.yaml cannot be read"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_the_start(
    files: dict[str, str], changed: dict[str, str], sentence: str
) -> None:
    folder = Path(files["ssl_certfile"]).parent
    changed = {name: str(folder / value) if value else "" for name, value in changed.items()}
    with pytest.raises(ConfigError, match=sentence):
        check_files(read_service_config({**files, **changed}))


def test_a_service_with_a_certificate_answers_over_tls_and_to_its_key_alone(
    files: dict[str, str], tmp_path: Path
) -> None:
    port = free_port()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in files.items()]
    command = [
        sys.executable,
        "-m",
        "serve_app",
        "serve",
        "--json",
        "--sample",
        "--port",
        str(port),
        *options,
    ]
    command += ["--device", "cpu", "--dtype", "float32", "--num-blocks", "256"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env={**os.environ, "QWEN3_DIST_API_KEY": "from the environment"},
        )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline() or json.dumps({"log": log.read_text()}))
        assert ready["url"] == f"https://127.0.0.1:{port}/v1", ready
        sample = json.loads(process.stdout.readline())
        assert sample["answer"].startswith("Hello")
        verify = ssl.create_default_context(cafile=files["ssl_certfile"])
        body = {"prompt": "hi", "max_tokens": 2}
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=verify, timeout=60) as client:
            assert client.post("/v1/completions", json=body).status_code == 401
            headers = {"authorization": "Bearer from the environment"}
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
    finally:
        process.terminate()
        process.communicate(timeout=120)
    wait_for(lambda: process.poll() is not None)
