"""Files for clusters: what a config becomes, the examples in the repository, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.render.options import NodeOptions
from serve_app.render.service import node_range, service_yaml
from serve_app.settings import read_service_config
from serve_app.settings.file import service_source
from tests.serve_app.command_line import printed, refusal
from tools.render_examples import DEPLOY, EXAMPLES, rendered

SERVICES = sorted((DEPLOY / "services").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_what_render_makes(example: str) -> None:
    assert (DEPLOY / example).read_text() == rendered(example), "run `make render`"


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.stem)
def test_a_config_that_is_written_reads_back_as_itself(service: Path, tmp_path: Path) -> None:
    config = service_source(service, {}).read()
    written = tmp_path / "service.yaml"
    written.write_text(service_yaml(config))
    assert service_source(written, {}).read() == config


def test_several_models_read_back_as_themselves(tmp_path: Path) -> None:
    models = [
        {"layout": "tp=2", "lora": "a=/one", "rank_env": {"NCCL_DEBUG": "INFO"}, "max_replicas": 3},
        {"model_name": "other", "speculative": "ngram,k=4", "enable_thinking": False},
    ]
    config = read_service_config({"models": models, "port": 9000})
    written = tmp_path / "service.yaml"
    written.write_text(service_yaml(config))
    assert service_source(written, {}).read() == config


@pytest.mark.parametrize(
    ("models", "gpus_per_node", "expected"),
    [
        ([{"layout": "tp=2,dp=8,ep=16"}], 8, (2, 2)),
        ([{"layout": "tp=4", "max_replicas": 2}], 8, (1, 1)),
        ([{"layout": "tp=4", "max_replicas": 3}], 8, (1, 2)),
        ([{"layout": "tp=2,pp=2", "max_replicas": 2}], 4, (1, 2)),
        ([{"layout": "tp=4,dp=3"}], 6, (3, 3)),  # two GPUs of each node are too few for a tp group
        ([{"layout": "tp=4,dp=3"}, {"layout": "tp=2,dp=3", "model_name": "b"}], 6, (3, 3)),
        ([{"layout": "tp=16", "device": "cpu"}], 8, (1, 1)),
    ],
)
def test_nodes_follow_from_the_layouts(
    models: list[dict[str, Any]], gpus_per_node: int, expected: tuple[int, int]
) -> None:
    config = read_service_config({"models": models})
    assert node_range(config, NodeOptions(gpus_per_node=gpus_per_node)) == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["kuberay", "--layout", "tp=16"], "a tp group of tp=16 takes 16 GPUs of one node and nodes have 8"),
        (["slurm", "--layout", "tp=8,dp=2", "--nodes", "1"], "nodes=1 of 8 GPUs are too few"),
        (["slurm", "--device", "cuda", "--gpus-per-node", "0"], "device=cuda needs GPUs"),
        (["kuberay", "--api-key", "k"], "api_key is a secret"),
        (["slurm", "--admin-key", "k"], "admin_key is a secret"),
        (["compose", "--api-key", "k"], "api_key is a secret"),
        (["systemd", "--api-key", "k"], "api_key is a secret"),
        (["slurm", "--namespace", "x"], "--namespace is no option of slurm"),
        (["kuberay", "--name", "9lives"], "cannot be the name of a RayService"),
        (["kuberay", "--upgrade", "later"], "upgrade must be one of"),
        (["kuberay", "--checkpoint-claim", "a", "--checkpoint-host-path", "/b"], "exclude each other"),
        (["slurm", "--time-limit", "a day"], "time_limit must be a time"),
        (["helm"], "invalid choice"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refusal(capsys, "render", *arguments)


def test_the_service_of_a_container_is_reached_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    compose = yaml.safe_load(printed(capsys, "render", "compose", "--port", "9000"))
    service = yaml.safe_load(compose["configs"]["service"]["content"])
    assert service == {"device": "cpu", "host": "0.0.0.0"}
    assert "127.0.0.1:9000:8000" in compose["services"]["service"]["ports"]


def test_compose_mounts_files_of_this_repository() -> None:
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    build = compose["services"]["service"]["build"]
    context = (DEPLOY / "compose" / build["context"]).resolve()
    assert (context / build["dockerfile"]).is_file() and (context / "pyproject.toml").is_file()
    mounted = [volume for service in compose["services"].values() for volume in service["volumes"]]
    sources = [volume.partition(":")[0] for volume in mounted if volume.startswith("..")]
    assert sources and all((DEPLOY / "compose" / source).exists() for source in sources)
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    assert compose["services"]["prometheus"]["network_mode"] == "service:service"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = tmp_path / "qwen3-dist.service"
    unit.write_text(printed(capsys, "render", "systemd", "--executable", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert checked.returncode == 0 and str(unit) not in checked.stderr, checked.stderr


def test_a_graceful_end_fits_into_the_time_that_each_target_gives(capsys: pytest.CaptureFixture[str]) -> None:
    longer = ("--graceful-shutdown-timeout-s", "1234")
    found = {
        "systemd": r"TimeoutStopSec=(\d+)",
        "slurm": r"--signal=B:TERM@(\d+)",
        "compose": r"stop_grace_period: (\d+)s",
        "kuberay": r"terminationGracePeriodSeconds: (\d+)",
    }
    for target, pattern in found.items():
        times = re.findall(pattern, printed(capsys, "render", target, *longer))
        assert times and all(int(time) > 1234 for time in times), target
