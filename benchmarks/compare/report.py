"""Reports a comparison as a table, and as one result file per model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.compare.limits import Machine, row_limit
from benchmarks.compare.workload import ROWS
from benchmarks.record import write
from qwen3_dist.config import ModelConfig


def keep(about: dict[str, Any], models: dict[str, list[dict[str, Any]]], kind: str = "compare") -> None:
    """Prints a table of each model's systems and writes its result file, `kind`-MODEL."""
    machine = _at_its_best(models)
    for name, systems in models.items():
        result = {
            "rates": asdict(machine),
            "model": name,
            "limits": _limits(name, machine),
            "systems": systems,
        }
        print(table(result))
        write(f"{kind}-{name}", about, result)


def _at_its_best(models: dict[str, list[dict[str, Any]]]) -> Machine:
    """The highest limits that were measured, since other programs may have slowed some measurements down."""
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


def table(result: dict[str, Any]) -> str:
    """Rates of one model by row, with the share of the machine's limit in brackets; last, our best over the best
    peer."""
    rates, limits, systems = result["rates"], result["limits"], result["systems"]
    columns = list(limits)
    lines = [
        f"Reads {rates['read_bytes_per_s'] / 1e9:.1f} GB/s, multiplies {rates['flops_per_s'] / 1e9:.0f} GFLOP/s."
        " Output tokens/s (prompt tokens/s where one token is made), and the share of the limit.",
        "",
        "| " + " | ".join([result["model"], *columns, "ready, s"]) + " |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for system in systems:
        cells = [_cell(system["rates"].get(row), limits[row], _bits(system)) for row in columns]
        lines.append("| " + " | ".join([system["system"], *cells, _ready(system["runs"])]) + " |")
    for bits in sorted({_bits(system) for system in systems}, reverse=True):
        ratios = [_ratio(systems, row, bits) for row in columns]
        lines.append("| " + " | ".join([f"ours / best peer, {bits} bits", *ratios, ""]) + " |")
    return "\n".join(lines)


def _cell(rate: float | None, limit: float, bits: int) -> str:
    """The rate, with its share of the limit, which is that of bf16 weights."""
    share = f" ({rate / limit:.0%})" if rate and bits == 16 else ""
    return "" if rate is None else f"{rate:.1f}{share}"


def _ready(runs: list[dict[str, Any]]) -> str:
    seconds = [run["ready_s"] for run in runs if "error" not in run and "ready_s" in run]
    return str(min(seconds)) if seconds else "failed"


def _bits(system: dict[str, Any]) -> int:
    """Bits of a weight. Results of earlier versions have none; only int8 in them is not bf16."""
    return int(system.get("bits", 8 if "int8" in system["system"] else 16))


def _ratio(systems: list[dict[str, Any]], row: str, bits: int) -> str:
    def best(peers: bool) -> float:
        return max(
            (s["rates"].get(row, 0) for s in systems if s["is_peer"] is peers and _bits(s) == bits), default=0
        )

    return f"{best(False) / best(True):.2f}" if best(True) and best(False) else ""
