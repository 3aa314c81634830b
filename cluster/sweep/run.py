"""Benchmarks layouts one after the other, stores each result, and resumes an interrupted sweep."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.planning.burst_point import BurstPoint
from cluster.yaml_file import read_yaml
from qwen3_dist.arrival_times import arrival_times
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.settings import EngineConfig

_MAX_ERROR_LENGTH = 300  # characters of the last line on stderr that are kept
ENGINE_CHILD = "cluster.sweep.child"


@dataclass(frozen=True)
class Place:
    """Where layouts run: as engines in a child process, or over HTTP as services; on this machine, or in the Ray
    cluster at `ray_address`. `child` is the module that runs one layout."""

    ray_address: str | None = None
    http: bool = False
    child: str = ENGINE_CHILD

    def __str__(self) -> str:
        return (
            f"{'services' if self.http else 'engines'} {'in a Ray cluster' if self.ray_address else 'here'}"
        )


@dataclass(frozen=True)
class SweepPoint(BurstPoint):
    """Prompts that arrive at once, or at `rate` a second with the gaps of a Poisson process (an open loop)."""

    rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"rate must be positive, not {self.rate:g}")

    def __str__(self) -> str:
        return super().__str__() + (f" at {self.rate:g}/s" if self.rate else "")

    def arrivals_s(self, seed: int) -> list[float]:
        """Seconds after the start at which the prompts of a repeat with this seed arrive."""
        return arrival_times(self.num_prompts, self.rate or math.inf, 1.0, seed)


@dataclass(frozen=True)
class SweepWorkload:
    """The workload that every layout runs. Each point runs `repeats` times, and the median counts.

    timeout_s: time limit of one layout for loading and all points.
    """

    points: tuple[SweepPoint, ...]
    repeats: int = 1
    device: str = "auto"
    dtype: str = "auto"
    max_num_batched_tokens: int | None = None
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if not self.points:
            raise ConfigError("points must hold at least one point")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be positive, not {self.repeats}")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s must be positive, not {self.timeout_s:g}")
        self.engine_config("", random_weights=False, layout=Layout())

    def engine_config(
        self, model: str, random_weights: bool, layout: Layout, on_ray: bool = False
    ) -> EngineConfig:
        """The engine settings for one layout; `on_ray`, its ranks are actors. Raises ConfigError."""
        here = "in_process" if layout.world == 1 else "processes"
        return EngineConfig(
            model=model,
            load_format="random" if random_weights else "checkpoint",
            layout=layout,
            device=self.device,
            dtype=self.dtype,
            executor="ray" if on_ray else here,
            max_model_len=max(point.input_len + point.output_len for point in self.points),
            max_num_batched_tokens=self.max_num_batched_tokens,
            prefix_caching=False,
        )


HERE = Place()


def read_workload(path: str | Path) -> SweepWorkload:
    """Reads a workload file in YAML. Raises ConfigError with file, line and reason."""
    return read_yaml(path).settings(SweepWorkload)


class SweepFolder:
    """The directory of a sweep: `sweep.json` has the model, workload and place, `layouts/` a result for each layout
    with the figures of every repeat."""

    def __init__(self, path: Path, model: str, workload: SweepWorkload, place: Place = HERE) -> None:
        """Creates the directory, or opens an existing sweep. Raises ConfigError if what `sweep.json` has differs."""
        self.path = path
        about = {"model": model, "workload": json.loads(json.dumps(asdict(workload))), "place": str(place)}
        file = path / "sweep.json"
        try:
            (path / "layouts").mkdir(parents=True, exist_ok=True)
            if not file.exists():
                _write(file, about)
            earlier = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out {path} cannot be used ({error}); choose another directory") from None
        if earlier != about:
            differing = next(key for key in about if earlier.get(key) != about[key])
            raise ConfigError(
                f"--out {path} holds a sweep with another {differing}; choose another directory or remove it"
            )

    def result(self, layout: Layout) -> dict[str, Any] | None:
        """The stored result of a layout, with its `points` or an `error`; None if it has not run."""
        file = self._file(layout)
        try:
            found: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            return None
        return found

    def keep(self, layout: Layout, result: dict[str, Any]) -> None:
        """Stores the result of a layout."""
        _write(self._file(layout), {"layout": str(layout), **result})

    def _file(self, layout: Layout) -> Path:
        return self.path / "layouts" / f"{str(layout).replace('=', '').replace(',', '-')}.json"


def run_sweep(
    folder: SweepFolder,
    layouts: Sequence[Layout],
    model_path: Path,
    random_weights: bool,
    workload: SweepWorkload,
    report: Callable[[str], None],
    retry_failed: bool = False,
    place: Place = HERE,
) -> Iterator[tuple[Layout, dict[str, Any]]]:
    """Yields each layout with its result, stored or new. A layout that fails has a result with `error`."""
    for number, layout in enumerate(layouts, 1):
        known = folder.result(layout)
        progress = f"{number}/{len(layouts)} {layout}"
        if known is not None and not (retry_failed and "error" in known):
            report(f"{progress}: done earlier")
            yield layout, known
            continue
        report(f"{progress}: running")
        result = _run_child(layout, model_path, random_weights, workload, place)
        folder.keep(layout, result)
        if "error" in result:
            report(f"{progress}: failed: {result['error']}")
        yield layout, {"layout": str(layout), **result}


def _run_child(
    layout: Layout, model_path: Path, random_weights: bool, workload: SweepWorkload, place: Place
) -> dict[str, Any]:
    """Runs one layout in a child process, so that it leaves nothing behind and a crash does not end the sweep."""
    job = {
        "layout": str(layout),
        "model": str(model_path),
        "random_weights": random_weights,
        "ray_address": place.ray_address,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", place.child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        text = json.dumps({**job, "workload": asdict(workload)})
        out, errors = child.communicate(text, timeout=workload.timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than timeout_s={workload.timeout_s:g}"}
    finally:
        child.kill()  # its ranks end when their engine is gone
        child.wait()
    if child.returncode == 0:
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result
    last_line = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
    return {"error": f"its process ended with code {child.returncode}: {last_line[-_MAX_ERROR_LENGTH:]}"}


def _write(file: Path, value: dict[str, Any]) -> None:
    """Writes the file atomically."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, file)
