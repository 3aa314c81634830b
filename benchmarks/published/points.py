"""Measured points of other engines, from CSV files: TTFT and TPOT of a closed loop of clients."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from cluster.planning.official import official_configs
from qwen3_dist.errors import ConfigError

# Names in the files: presets of `cluster.hardware`; endings of official names in `cluster.planning.official`.
SYSTEMS = {"a100_sxm": "A100", "h100_sxm": "H100", "h200_sxm": "H200", "b200_sxm": "B200", "gb200": "B200"}
WEIGHTS = {"bf16": "", "fp8": "-FP8-dynamic", "fp8_block": "-FP8", "nvfp4": "-NVFP4"}
KINDS = {"fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "fp4"}  # fields of `cluster.hardware.Device`
_ENDINGS = ("-FP8", "-NVFP4")


@dataclass(frozen=True)
class Point:
    """`model`: an official name of Qwen3 with its weights. `batch`: requests in flight in a dp group. `layout`: tp,
    dp, and the ranks over which experts are cut (etp) and shared out (ep); 0: unknown."""

    model: str
    device: str
    engine: str
    version: str
    weights: str
    input_len: int
    output_len: int
    batch: int
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
            self.input_len, self.output_len, self.batch,
        )  # fmt: skip


def read_points(path: Path) -> list[Point]:
    """The points of a file. Raises ConfigError that names the file, the line and the column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a CSV file of measured points") from None
    rows = csv.DictReader(text.splitlines())
    return [_Row(row, f"{path}:{rows.line_num}").point() for row in rows]


@dataclass(frozen=True)
class _Row:
    """The columns of a line. `place` names it in messages."""

    columns: dict[str, str]
    place: str

    def point(self) -> Point:
        weights = self._text("weights").rstrip("?")
        name = self._text("model").rpartition("/")[2]
        for ending in _ENDINGS:
            name = name.removesuffix(ending)
        dp, etp, ep = (self._count(column, least=0) for column in ("dp", "moe_tp", "moe_ep"))
        return Point(
            self._known("model", name, {known: known for known in official_configs()})
            + self._known("weights", weights, WEIGHTS),
            self._known("system", self._text("system"), SYSTEMS),
            self.columns.get("engine") or "",
            self.columns.get("engine_version") or "",
            weights,
            self._count("isl"),
            self._count("osl"),
            self._count("batch"),
            (self._count("tp"), dp, etp, ep),
            self._number("ttft_ms"),
            self._number("tpot_ms"),
        )

    def _text(self, column: str) -> str:
        text = self.columns.get(column)
        if not text:
            raise ConfigError(f"{self.place}: {column} is missing")
        return text

    def _number(self, column: str) -> float:
        text = self._text(column)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"{self.place}: {column} must be a positive number, not {text!r}")
        return number

    def _count(self, column: str, least: int = 1) -> int:
        text = self.columns.get(column) or ("" if least else "0")
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(f"{self.place}: {column} must be a whole number from {least} on, not {text!r}")
        return int(text)

    def _known(self, column: str, text: str, known: dict[str, str]) -> str:
        if text not in known:
            raise ConfigError(f"{self.place}: {column} {text!r} is not known; known are {', '.join(known)}")
        return known[text]
