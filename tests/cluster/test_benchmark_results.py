"""The kept results of benchmarks: one naming scheme, and an index that fits them."""

from __future__ import annotations

import pytest

from benchmarks.record import RESULTS, machine_name, result_file
from benchmarks.results_index import load, page


def test_every_file_is_named_by_its_kind_and_machine() -> None:
    for name, result in load().items():
        on_gpu = result.get("device") == "cuda"
        assert name == result_file(result["kind"], result["hardware"], on_gpu).name
        assert {"date", "hardware", "versions"} <= result.keys()


def test_the_index_is_fresh() -> None:
    assert (RESULTS / "README.md").read_text() == page(load()), "run python -m benchmarks.results_index"


def test_results_hold_nothing_but_their_files_and_the_index() -> None:
    files = {file.name for file in RESULTS.iterdir() if not file.name.startswith("gpu-check-part-")}
    assert files == {*load(), "README.md"}


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ({"cpu": "AMD EPYC", "cpu_family": 26, "vector_units": ["avx2", "avx512f"]}, "zen5-2cores"),
        ({"cpu": "AMD EPYC", "cpu_family": 25, "vector_units": ["avx2", "avx512f"]}, "zen4-2cores"),
        ({"cpu": "AMD EPYC", "cpu_family": 25, "vector_units": ["avx2"]}, "amd-avx2-2cores"),
        ({"cpu": "Intel(R) Xeon(R)", "vector_units": ["avx2", "avx512f", "amx_bf16"]}, "intel-amx-2cores"),
        ({"cpu": "aarch64", "vector_units": []}, "cpu-2cores"),
    ],
)
def test_a_machine_is_named_by_the_generation_of_its_cpu(hardware: dict[str, object], name: str) -> None:
    assert machine_name({**hardware, "cores": 2}) == name


def test_a_gpu_run_is_named_by_its_gpus() -> None:
    assert (
        machine_name({"cpu": "AMD EPYC", "cores": 16, "gpus": ["NVIDIA H200"] * 2}, on_gpu=True) == "2xH200"
    )
