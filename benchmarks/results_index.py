"""Writes `benchmarks/results/README.md`: what each result file measures, on which machine, when and how.

    python -m benchmarks.results_index

`benchmarks.record.write` runs this too, but `make gpu-check` does not. tests/cluster/test_benchmark_results.py fails
if the page is stale.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from benchmarks.compare.report import table
from benchmarks.record import RESULTS

_HEAD = """\
# Results

Written by `python -m benchmarks.results_index`; do not edit.

Each file is named `KIND-MACHINE.json` and holds the newest run of that kind of benchmark on that kind of machine.
MACHINE is the CPU's generation (`zen5`, `zen4`) or its vendor and widest vector unit (`intel-amx`, `amd-avx2`; only
`amd` or `intel` if the run recorded no more), then the number of cores. For GPU runs it is the GPUs (`1xH200`).
Every file starts with `kind`, `date`, `hardware` and `versions`. To repeat a run, use its command on an idle machine.
"""


def load() -> dict[str, dict[str, Any]]:
    """All results by file name, except those of partial GPU checks."""
    files = sorted(file for file in RESULTS.glob("*.json") if not file.name.startswith("gpu-check-part-"))
    return {file.name: json.loads(file.read_text()) for file in files}


def module_of(kind: str) -> Path:
    """The benchmark that writes results of this kind, for example `http_overhead.py` for `http-overhead-haproxy`."""
    words = kind.split("-")
    while words:
        path = RESULTS.parent / "_".join(words)
        for file in (path / "__main__.py", path.with_suffix(".py")):
            if file.exists():
                return file
        words.pop()
    raise ValueError(f"no benchmark writes results of kind {kind!r}")


def page(results: dict[str, dict[str, Any]]) -> str:
    """The text of results/README.md."""
    lines = [_HEAD]
    for kind in dict.fromkeys(result["kind"] for result in results.values()):
        file = module_of(kind)
        first_line = (
            (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        )
        command = file.parent.name if file.name == "__main__.py" else file.stem
        lines += [f"## {kind}", "", first_line, "", f"`python -m benchmarks.{command}`", ""]
        lines += ["| file | CPU or GPU | date | torch | commit |", "|---|---|---|---|---|"]
        of_kind = {name: result for name, result in results.items() if result["kind"] == kind}
        lines += [_row(name, result) for name, result in of_kind.items()]
        lines += [""]
        if kind.startswith("compare"):
            for name, result in of_kind.items():
                lines += [f"`{name}`: {table(result)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    machine = f"{hardware['cores']} cores of {hardware['cpu']}"
    if result.get("device") == "cuda":
        machine = f"{len(hardware['gpus'])} x {hardware['gpus'][0]}"
    return f"| [{name}]({name}) | {machine} | {result['date']} | {versions['torch']} | {versions['commit']} |"


def write_index() -> None:
    """Rewrites the page."""
    (RESULTS / "README.md").write_text(page(load()))


if __name__ == "__main__":
    write_index()
