"""The comparison as a table, and as JSON in results/."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.compare.limits import Machine, row_limit
from benchmarks.compare.workload import ROWS
from benchmarks.record import RESULTS
from qwen3_dist.config import ModelConfig


def keep(about: dict[str, Any], models: dict[str, list[dict[str, Any]]]) -> None:
    """Prints a table of what each model's systems gave and writes it beside the JSON."""
    machine = _at_its_best(models)
    limits = {name: _limits(name, machine) for name in models}
    text = table(machine, limits, models)
    print(text)
    name = f"compare-cpu-{about['date']}"
    (RESULTS / f"{name}.md").write_text(text + "\n")
    found = [{"model": name, "limits": limits[name], "systems": systems} for name, systems in models.items()]
    record = {**about, "machine": asdict(machine), "models": found}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _at_its_best(models: dict[str, list[dict[str, Any]]]) -> Machine:
    """The highest rates that were measured: other programs may have had a share of the machine at times."""
    runs = [run for systems in models.values() for system in systems for run in system["runs"]]
    measured = [Machine(**run["machine"]) for run in runs]
    return Machine(
        max(machine.read_bytes_per_s for machine in measured),
        max(machine.flops_per_s for machine in measured),
    )


def _limits(model: str, machine: Machine) -> dict[str, float]:
    """The highest rate of each row."""
    config = ModelConfig.from_dict(SHAPES[model])
    return {str(row): row.rate(row_limit(config, row, machine)) for row in ROWS}


def table(
    machine: Machine, limits: dict[str, dict[str, float]], models: dict[str, list[dict[str, Any]]]
) -> str:
    """Rates by row, in brackets the share of the machine's limit, then our best over the best peer."""
    lines = [
        f"Reads {machine.read_bytes_per_s / 1e9:.1f} GB/s, multiplies {machine.flops_per_s / 1e9:.0f} GFLOP/s."
        " Output tokens/s (prompt tokens/s where one token is made), and the share of the limit.",
    ]
    for name, systems in models.items():
        columns = [str(row) for row in ROWS]
        lines += ["", "| " + " | ".join([name, *columns, "ready, s"]) + " |"]
        lines += ["|" + "---|" * (len(columns) + 2)]
        for system in systems:
            cells = [_cell(system["rates"].get(row), limits[name][row]) for row in columns]
            lines.append("| " + " | ".join([system["system"], *cells, _ready(system["runs"])]) + " |")
        ratios = [_ratio(systems, row) for row in columns]
        lines.append("| " + " | ".join(["ours / best peer", *ratios, ""]) + " |")
    return "\n".join(lines)


def _cell(rate: float | None, limit: float) -> str:
    return "" if rate is None else f"{rate:.1f} ({rate / limit:.0%})"


def _ready(runs: list[dict[str, Any]]) -> str:
    seconds = [run["ready_s"] for run in runs if "error" not in run and "ready_s" in run]
    return str(min(seconds)) if seconds else "failed"


def _ratio(systems: list[dict[str, Any]], row: str) -> str:
    def best(peers: bool) -> float:
        return max(
            (s["rates"].get(row, 0) for s in systems if s["is_peer"] is peers and "int8" not in s["system"]),
            default=0,
        )

    return f"{best(False) / best(True):.2f}" if best(True) and best(False) else ""
