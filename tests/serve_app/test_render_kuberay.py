"""Manifests of KubeRay against the schema of its own resource definition, and the rules that its operator adds."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from serve_app.launch.schema import serve_schema
from serve_app.render.options import KubernetesOptions, NodeOptions
from serve_app.render.service import for_cluster
from serve_app.settings.file import service_source
from tests.serve_app.command_line import printed
from tools.render_examples import DEPLOY, EXAMPLES

DEFINITION = Path(__file__).parent.parent / "data" / "kuberay" / "rayservice.json"
MANIFESTS = [DEPLOY / name for name in EXAMPLES if name.startswith("kuberay/")]


def strict(schema: Any) -> Any:
    """A schema of Kubernetes as a JSON schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items() if not name.startswith("x-kubernetes-")}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return made


VALIDATOR = Draft202012Validator(strict(json.loads(DEFINITION.read_text())))


def faults(manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(manifest)]


def pods(manifest: Any) -> dict[str, Any]:
    cluster = manifest["spec"]["rayClusterConfig"]
    [group] = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"]["spec"], "worker": group["template"]["spec"]}


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request: pytest.FixtureRequest) -> Any:
    return yaml.safe_load(request.param.read_text())


def test_kuberay_takes_the_manifest(manifest: Any) -> None:
    assert not faults(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.serveConfig", "x"),
        ("spec.rayClusterConfig.workers", []),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.terminationGraceSeconds", 5),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.terminationGracePeriodSeconds", "5s"),
        ("spec.upgradeStrategy.clusterUpgradeOptions", {"stepSizePercent": 5}),
        ("spec.rayClusterConfig.rayVersion", 2.6),
    ],
)
def test_a_wrong_field_is_found(path: str, value: Any) -> None:
    manifest = copy.deepcopy(yaml.safe_load(MANIFESTS[0].read_text()))
    *parents, last = path.split(".")
    place = manifest
    for name in parents:
        place = place[name]
    place[last] = value
    assert faults(manifest)


def test_serve_takes_its_config(manifest: Any) -> None:
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert config["http_options"]["host"] == "0.0.0.0"
    assert all(app.get("args", {}).get("device") != "auto" for app in config["applications"])


def test_the_serve_config_is_what_deploy_gives_to_serve() -> None:
    config = service_source(DEPLOY / "services" / "two-nodes.yaml", {}).read()
    manifest = yaml.safe_load((DEPLOY / "kuberay" / "two-nodes.yaml").read_text())
    expected = serve_schema(for_cluster(config, NodeOptions()))
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == json.loads(json.dumps(expected))


def test_the_operator_takes_the_name_and_the_upgrade(manifest: Any) -> None:
    """What KubeRay checks beyond its schema."""
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
    strategy = manifest["spec"]["upgradeStrategy"]
    if strategy["type"] == "NewClusterWithIncrementalUpgrade":
        options = strategy["clusterUpgradeOptions"]
        assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
        assert manifest["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    else:
        assert "clusterUpgradeOptions" not in strategy


def test_workers_are_ready_once_the_service_is_and_the_head_does_not_wait_for_it(manifest: Any) -> None:
    """KubeRay deploys the applications once the head is ready."""
    [head], [worker] = (pod["containers"] for pod in pods(manifest).values())
    assert "readinessProbe" not in head
    assert worker["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "serve"}
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert ports["serve"] == config["http_options"]["port"]


def test_pods_drain_and_have_time_for_it(manifest: Any) -> None:
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    longest = max(
        deployment["graceful_shutdown_timeout_s"]
        for app in config["applications"]
        for deployment in app["deployments"]
    )
    for pod in pods(manifest).values():
        [container] = pod["containers"]
        *command, timeout_s = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "cluster.nodes", "drain", "--timeout-s"]
        assert longest < float(timeout_s) < pod["terminationGracePeriodSeconds"]


def test_every_node_has_the_environment_and_the_shared_memory_that_the_service_needs(manifest: Any) -> None:
    for pod in pods(manifest).values():
        [container] = pod["containers"]
        assert {"name": "RAY_SERVE_PROXY_USE_GRPC", "value": "1"} in container["env"]
        assert {
            "name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
            "value": "serve_app.ingress.proxy.middlewares",
        } in container["env"]
        [shm] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_checkpoints_secrets_and_kinds_of_gpus_reach_the_pods(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys,
        *("render", "kuberay", "--layout", "tp=2", "--gpus-per-node", "2", "--gpu-type", "H100"),
        *("--checkpoint-host-path", "/data", "--secret-env", "hub", "--secret-files", "keys"),
        *("--namespace", "models", "--image", "registry/image:1", "--route-prefix", "/small"),
    )
    manifest = yaml.safe_load(text)
    assert not faults(manifest) and manifest["metadata"]["namespace"] == "models"
    pod = pods(manifest)["worker"]
    [container] = pod["containers"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "checkpoint": "/models", "secrets": "/etc/qwen3-dist/secrets"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/small/ready"
    assert KubernetesOptions().image not in text
