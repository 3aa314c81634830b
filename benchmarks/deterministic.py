"""What deterministic mode costs: tokens/s with it and without, in turns, dense and MoE, with one rank and two.

python -m benchmarks.deterministic [--models dense moe] [--turns N] [--decode-tokens N] [--prompt-tokens N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.record import keep
from qwen3_dist.benchmark import Workload, measure, warm_up
from qwen3_dist.engine.engine import Engine
from qwen3_dist.settings import EngineConfig

BATCH = 8


def compared(model: Path, layout: str, workloads: dict[str, Workload], turns: int) -> list[dict[str, Any]]:
    """Both engines are there at once, and one computes at a time."""
    rates: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in workloads}
    with contextlib.ExitStack() as stack:
        engines = {}
        for deterministic in (False, True):
            config = EngineConfig(
                model=str(model),
                load_format="random",
                layout=layout,  # type: ignore[arg-type]  # which it parses
                executor="in_process" if layout == "tp=1" else "processes",
                deterministic=deterministic,
                max_model_len=2048,
                kv_cache_gib=1,
                prefix_caching=False,
            )
            engines[deterministic] = Engine(config)
            stack.callback(engines[deterministic].shutdown)
            warm_up(engines[deterministic])
        for _ in range(turns):
            for name, workload in workloads.items():
                for deterministic, engine in engines.items():
                    rates[name][deterministic].append(measure(engine, workload)["total_tokens_per_s"])
    medians = {
        name: {mode: statistics.median(each) for mode, each in modes.items()} for name, modes in rates.items()
    }
    return [
        {
            "model": model.name,
            "layout": layout,
            "work": name,
            "default_tokens_per_s": rates[name][False],
            "deterministic_tokens_per_s": rates[name][True],
            "ratio_of_medians": round(medians[name][True] / medians[name][False], 2),
        }
        for name in workloads
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deterministic", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    options = parser.parse_args()
    workloads = {
        f"decode, batch {BATCH}": Workload(BATCH, 8, options.decode_tokens),
        f"prompt of {options.prompt_tokens}": Workload(1, options.prompt_tokens, 1),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            model = Path(folder) / name
            model.mkdir()
            (model / "config.json").write_text(json.dumps(SHAPES[name]))
            for layout in ("tp=1", "tp=2"):
                rows += compared(model, layout, workloads, options.turns)
    keep("deterministic", rows)


if __name__ == "__main__":
    main()
