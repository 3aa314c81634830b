"""What is checked before anything starts: the models' files, the port, the certificate and the keys file."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import ray_private
from qwen3_dist.errors import ConfigError, QwenDistError, ResourceError
from serve_app.launch.model_check import check_keys_file, check_model
from serve_app.settings import EndpointSettings, ModelSettings, ServiceConfig
from serve_app.settings.keys import read_keys

_ANSWER_S = 30.0


def check_model_in_cluster(model: ModelSettings) -> None:
    """Checks a model where its files are: in the connected Ray cluster. Raises what `check_model` does."""
    error = ray.get(
        ray.remote(num_cpus=0, runtime_env={"env_vars": ray_private.DEPLOYMENT_ENVIRONMENT})(_refusal).remote(
            model
        )
    )
    if error is not None:
        raise error


def _refusal(model: ModelSettings) -> QwenDistError | None:
    try:
        check_model(model)
    except QwenDistError as error:
        return error
    return None


def check_keys_in_cluster(config: ServiceConfig) -> None:
    """Raises ConfigError if no node of the connected Ray cluster can use the keys file: an ingress that cannot read it
    ends, and with it a service that runs. Which nodes get an ingress, Ray Serve alone decides."""
    if not config.ingress.keys_file:
        return
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    asked = [
        ray.remote(_keys_refusal)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(config.ingress.keys_file)
        for node in nodes
    ]
    done, late = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S)
    try:
        reasons = ray.get(done)
    except RayError:  # a node left meanwhile
        return
    if all(reasons) and not late:
        raise ConfigError(f"no node can use the keys_file: {reasons[0]}", ("keys_file",))


def _keys_refusal(path: str) -> str:
    try:
        read_keys(path)
    except ConfigError as error:
        return str(error)
    return ""


def check_device(device: str) -> None:
    """Checks `device` ("auto", "cpu" or "cuda") for a local Ray, which has no GPUs of other hosts.

    Raises ResourceError for "cuda" if torch sees no GPU. Torch is imported only where it has something to say.
    """
    if device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists()):
        from qwen3_dist.worker.cards import local_device

        local_device(device)


def check_port(endpoint: EndpointSettings) -> None:
    """Raises ResourceError if another process listens on the port, or the host is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {endpoint.host}:{endpoint.port} ({error.strerror}); choose another --host or --port"
            ) from None


def check_files(config: ServiceConfig) -> None:
    """Raises ConfigError if the certificate, its key or the keys file of the service cannot be used."""
    endpoint = config.endpoint
    if endpoint.ssl_certfile:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(endpoint.ssl_certfile, endpoint.ssl_keyfile, password=_no_password)
        except OSError as error:  # ssl.SSLError too
            raise ConfigError(
                f"ssl_certfile {endpoint.ssl_certfile} and ssl_keyfile {endpoint.ssl_keyfile} cannot be used "
                f"({error.strerror or error}); give a certificate and its key as PEM files"
            ) from None
    check_keys_file(config.ingress)


def _no_password() -> str:
    raise ConfigError(
        "ssl_keyfile has a password; give a key without one, in a file that only its owner may read"
    )
