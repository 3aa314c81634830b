"""Measured points of other engines, from CSV files: TTFT and TPOT of a closed loop of clients."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3_dist.errors import ConfigError

# Names in the files: presets of `cluster.hardware`; endings of official names in `cluster.planning.official`.
SYSTEMS = {"a100_sxm": "A100", "h100_sxm": "H100", "h200_sxm": "H200", "b200_sxm": "B200", "gb200": "B200"}
WEIGHTS = {"bf16": "", "fp8": "-FP8-dynamic", "fp8_block": "-FP8", "nvfp4": "-NVFP4"}
KINDS = {"fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "fp4"}  # fields of `cluster.hardware.Device`
_ENDINGS = ("-FP8", "-NVFP4")


@dataclass(frozen=True)
class Point:
    """`model`: an official name of Qwen3 with its weights. `clients`: requests in flight. `layout`: tp, dp, and the
    ranks over which experts are cut (etp) and shared out (ep); 0: unknown."""

    model: str
    device: str
    engine: str
    version: str
    weights: str
    input_len: int
    output_len: int
    clients: int
    layout: tuple[int, int, int, int]
    ttft_ms: float
    tpot_ms: float

    @property
    def has_experts(self) -> bool:
        """Whether the model is a Mixture of Experts: its name has the active parameters, as in 235B-A22B."""
        return "-A" in self.model

    @property
    def workload(self) -> tuple[object, ...]:
        """What points of several layouts have in common."""
        return (
            self.model, self.device, self.engine, self.version, self.weights,
            self.input_len, self.output_len, self.clients,
        )  # fmt: skip


def read_points(path: Path) -> list[Point]:
    """The points of a file. Raises ConfigError that names the file, the line and the column."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a CSV file of measured points") from None
    return list(_points(path, csv.DictReader(text.splitlines())))


def _points(path: Path, rows: csv.DictReader[str]) -> Iterator[Point]:
    for row in rows:
        column = ""
        try:
            for column in ("model", "system", "weights", "isl", "osl", "batch", "tp", "ttft_ms", "tpot_ms"):
                if not row.get(column):
                    raise ValueError("is missing")
            column, device = "system", SYSTEMS[row["system"]]
            column, weights = "weights", row["weights"].rstrip("?")
            name = row["model"].rpartition("/")[2]
            for ending in _ENDINGS:
                name = name.removesuffix(ending)
            column, model = "weights", name + WEIGHTS[weights]
            numbers = []
            for column in ("isl", "osl", "batch", "tp"):
                numbers.append(int(row[column]))
                if numbers[-1] < 1:
                    raise ValueError("must be positive")
            parts = [int(row.get(column) or 0) for column in ("dp", "moe_tp", "moe_ep")]
            times = []
            for column in ("ttft_ms", "tpot_ms"):
                times.append(float(row[column]))
                if not times[-1] > 0:
                    raise ValueError("must be positive")
        except (KeyError, ValueError) as error:
            known = f"; known are {', '.join((SYSTEMS, WEIGHTS)[column == 'weights'])}"
            shown = known if isinstance(error, KeyError) else f" ({error})"
            raise ConfigError(
                f"{path}:{rows.line_num}: {column} {row.get(column)!r} is not valid{shown}"
            ) from None
        input_len, output_len, clients, tp = numbers
        layout = (tp, parts[0], parts[1], parts[2])
        engine, version = row.get("engine") or "", row.get("engine_version") or ""
        yield Point(
            model,
            device,
            engine,
            version,
            weights,
            input_len,
            output_len,
            clients,
            layout,
            times[0],
            times[1],
        )
