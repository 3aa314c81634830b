"""The comparison as a table, and as JSON in results/."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from benchmarks.compare.limits import Machine
from benchmarks.compare.workload import ROWS
from benchmarks.record import RESULTS


def keep(about: dict[str, Any], machine: Machine, models: list[dict[str, Any]]) -> None:
    """Prints a table and writes it beside the JSON."""
    text = table(machine, models)
    print(text)
    name = f"compare-cpu-{about['date']}"
    (RESULTS / f"{name}.md").write_text(text + "\n")
    record = {**about, "machine": asdict(machine), "models": models}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def table(machine: Machine, models: list[dict[str, Any]]) -> str:
    """Rates by row, in brackets the share of the machine's limit, then our best over the best peer."""
    lines = [
        f"Reads {machine.read_bytes_per_s / 1e9:.1f} GB/s, multiplies {machine.flops_per_s / 1e9:.0f} GFLOP/s."
        " Output tokens/s (prompt tokens/s where one token is made), and the share of the limit.",
    ]
    for model in models:
        columns = [str(row) for row in ROWS]
        lines += ["", "| " + " | ".join([model["model"], *columns, "ready, s"]) + " |"]
        lines += ["|" + "---|" * (len(columns) + 2)]
        for system in model["systems"]:
            cells = [_cell(system["rates"].get(row), model["limits"][row]) for row in columns]
            ready = "failed" if "error" in system else str(system.get("ready_s", ""))
            lines.append("| " + " | ".join([system["system"], *cells, ready]) + " |")
        ratios = [_ratio(model["systems"], row) for row in columns]
        lines.append("| " + " | ".join(["ours / best peer", *ratios, ""]) + " |")
    return "\n".join(lines)


def _cell(rate: float | None, limit: float) -> str:
    return "" if rate is None else f"{rate:.1f} ({rate / limit:.0%})"


def _ratio(systems: list[dict[str, Any]], row: str) -> str:
    def best(peers: bool) -> float:
        return max(
            (s["rates"].get(row, 0) for s in systems if s["is_peer"] is peers and "int8" not in s["system"]),
            default=0,
        )

    return f"{best(False) / best(True):.2f}" if best(True) and best(False) else ""
