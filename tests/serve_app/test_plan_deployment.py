"""`plan --render`: the files say what was planned, and the readers of a service's config accept them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.cli import build_parser
from serve_app.cli.options import given_service
from serve_app.settings import ServiceConfig, read_service_config
from serve_app.settings.file import service_source
from tests.serve_app.command_line import printed, refusal

ASKED = (
    "plan",
    "Qwen3-8B",
    "--gpus",
    "8xH100",
    "--input-len",
    "1000",
    "--output-len",
    "500",
    "--concurrency",
    "64",
)
CHANGED = ("--quantize", "int8", "--kv-cache-dtype", "fp8", "--max-num-batched-tokens", "4096",
           "--hf-overrides", '{"max_position_embeddings": 8192}')  # fmt: skip


def service(text: str, tmp_path: Path) -> ServiceConfig:
    file = tmp_path / "service.yaml"
    file.write_text(text)
    return service_source(file, {}).read()


def best(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json").splitlines()[0])
    return found


@pytest.mark.parametrize("changes", [(), CHANGED], ids=["plain", "changed"])
def test_the_service_is_what_was_planned(
    changes: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = best(capsys, *ASKED, *changes)
    [model] = service(printed(capsys, *ASKED, *changes, "--render", "serve"), tmp_path).models
    engine, scaling = model.replica.engine, model.scaling
    assert engine.model == "Qwen3-8B" and str(engine.layout) == planned["layout"]
    assert scaling.min_replicas == scaling.max_replicas == 8 // engine.layout.world
    assert engine.max_num_batched_tokens == (4096 if changes else 8192)
    assert (engine.quantize, engine.kv_cache_dtype) == (("int8", "fp8") if changes else ("none", "auto"))
    assert ("8192" in str(engine.hf_overrides)) == bool(changes)


def test_the_command_and_the_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *_, command = printed(capsys, *ASKED, *CHANGED).strip().splitlines()
    parsed = build_parser().parse_args(shlex.split(command)[1:])
    assert given_service(parsed).read() == service(
        printed(capsys, *ASKED, *CHANGED, "--render", "serve"), tmp_path
    )


def test_a_load_beyond_the_defaults_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = (
        "plan",
        "Qwen3-8B",
        "--gpus",
        "1xH200",
        "--input-len",
        "100",
        "--output-len",
        "500",
        "--rate",
        "26",
    )
    in_flight = best(capsys, *many)["in_flight"]
    [model] = service(printed(capsys, *many, "--render", "serve"), tmp_path).models
    limits = (model.replica.engine.max_num_seqs or 256, model.scaling.max_ongoing_requests)
    assert in_flight > 256 and min(limits) >= in_flight


def test_speculation_is_deployed_as_planned_and_adapters_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (
        "plan",
        "Qwen3-8B",
        "--gpus",
        "1xH200",
        "--input-len",
        "100",
        "--output-len",
        "50",
        "--concurrency",
        "8",
    )
    factors = ("--drafted", "4", "--acceptance", "0.5", "--lora-rank", "16")
    [model] = service(printed(capsys, *asked, *factors, "--render", "serve"), tmp_path).models
    assert str(model.replica.engine.speculative).startswith("ngram,k=4")
    shown = printed(capsys, *asked, *factors)
    assert "--speculative ngram,k=4" in shown and "Add your adapters with --lora" in shown


def test_kuberay_runs_the_layout_on_nodes_of_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", "Qwen3-235B-A22B", "--gpus", "2x8xH200", *ASKED[4:])
    layout = best(capsys, *asked)["layout"]
    manifest = yaml.safe_load(printed(capsys, *asked, "--render", "kuberay"))
    schema = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(schema)
    engine = read_service_config(schema["applications"][1]["args"]).models[0].replica.engine
    assert str(engine.layout) == layout and engine.device == "cuda"
    [group] = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == 2 and group["rayStartParams"]["num-gpus"] == "8"


def test_slurm_takes_part_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, *ASKED[:2], "--gpus", "4xH100", *ASKED[4:], "--render", "slurm")
    assert "#SBATCH --gpus-per-node=4\n" in script and "#SBATCH --nodes=1\n" in script
    text = re.search(r"<<'END_OF_SERVICE'\n(.*?)END_OF_SERVICE", script, re.DOTALL)
    assert text is not None
    [model] = service(text[1], tmp_path).models
    assert model.replica.engine.layout.world * model.scaling.max_replicas == 4


def test_the_cheapest_kind_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (
        "plan",
        "Qwen3-8B",
        "--gpus",
        "H100,H200",
        "--input-len",
        "1000",
        "--output-len",
        "500",
        "--rate",
        "24",
    )
    for cheap, dear in (("H100", "H200"), ("H200", "H100")):
        priced = (*asked, "--price", f"{cheap}=0.01,{dear}=100")
        planned = best(capsys, *priced)
        assert planned["gpus"].endswith(cheap)
        [model] = service(printed(capsys, *priced, "--render", "serve"), tmp_path).models
        assert str(model.replica.engine.layout) == planned["layout"]
        assert model.scaling.max_replicas == planned["replicas"]


def test_with_a_file_the_plan_is_printed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.yaml"
    assert "To serve the best layout:" in printed(capsys, *ASKED, "--render", "serve", "--out", str(file))
    assert file.read_text() == printed(capsys, *ASKED, "--render", "serve")
    told = refusal(capsys, *ASKED, "--render", "serve", "--out", str(tmp_path / "no" / "such"))
    assert "cannot be written (No such file or directory); choose another --out" in told


def test_stdout_has_the_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    as_json = json.loads(printed(capsys, *ASKED, "--render", "serve", "--json"))
    assert as_json == {"target": "serve", "text": printed(capsys, *ASKED, "--render", "serve")}
    small = ("plan", "Qwen3-235B-A22B", "--gpus", "1xH100", *ASKED[4:], "--render", "serve")
    assert "no layout of Qwen3-235B-A22B fits" in refusal(capsys, *small)


def test_a_config_file_is_served_from_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster.planning.official import official_configs

    file = tmp_path / "config.json"
    file.write_text(json.dumps(official_configs()["Qwen3-8B"]))
    [model] = service(printed(capsys, "plan", str(file), *ASKED[2:], "--render", "serve"), tmp_path).models
    assert model.replica.engine.model == str(tmp_path)


def test_ranks_of_a_shared_host_are_rendered_for_cpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("preset: H100\nnum_devices: 2\ndevices_per_node: 2\nshared_host: true\n")
    script = printed(capsys, *ASKED[:2], "--cluster", str(file), *ASKED[4:], "--render", "slurm")
    assert "--gpus-per-node" not in script and "device: cpu" in script
