"""The GPU presets' predictions against figures of other engines. Runs no model.

    python -m benchmarks.published                                  # against published throughput
    python -m benchmarks.published --points FILE.csv ... [--json]    # against measured TTFT and TPOT
    python -m benchmarks.published --points FILE.csv ... --fit       # fits the presets' constants to them

A file of points has the columns model, system, engine, engine_version, weights, isl, osl, batch, tp, dp, moe_tp,
moe_ep, ttft_ms and tpot_ms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.published import throughput
from benchmarks.published.points import KINDS, Point, read_points
from benchmarks.published.predictions import errors, predicted
from cluster.hardware import FITTED
from cluster.planning.clients import Latencies
from cluster.planning.expected_errors import error_name
from cluster.planning.products import PLAIN
from qwen3_dist.errors import ConfigError, QwenDistError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--points", type=Path, nargs="+", metavar="FILE.csv", help="measured points")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fit", action="store_true", help="write cluster/fitted.json")
    args = parser.parse_args()
    if not args.points and (args.json or args.fit):
        parser.error("--json and --fit need --points")
    if not args.points:
        throughput.main()
        return 0
    try:
        points = [point for path in args.points for point in read_points(path)]
        if not points:
            raise ConfigError(
                "the files hold no points; give files with a line for each point after the header"
            )
        if args.fit:
            _fit(points)
            return 0
        found = [predicted(point) for point in points]
    except QwenDistError as error:
        print(f"benchmarks.published: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(errors(points, found)))
        return 0
    print("| device, weights | engine | points | TTFT error | bias | TPOT error | bias | pairs in order |")
    print("|---|---|---|---|---|---|---|---|")
    groups = defaultdict(list)
    for index, point in enumerate(points):
        groups[f"{point.device}, {point.weights} | {point.engine} {point.version}"].append(index)
    for name, indices in [*sorted(groups.items()), ("all |", list(range(len(points))))]:
        print(f"| {name} | {_row([points[i] for i in indices], [found[i] for i in indices])} |")
    return 0


def _row(points: Sequence[Point], found: Sequence[Latencies]) -> str:
    row = errors(points, found)
    return (
        f"{row['points']} | {row['ttft_mape']:.0%} | {row['ttft_bias']:+.0%} | {row['tpot_mape']:.0%} | "
        f"{row['tpot_bias']:+.0%} | {row['pairs_right']} of {row['pairs']}"
    )


def _fit(points: Sequence[Point]) -> None:
    import numpy as np

    from benchmarks.published.fit import fit

    found = fit(points, FITTED, print)
    groups = defaultdict(list)
    for point, pair in zip(points, found.errors, strict=True):
        name = error_name(point.device, KINDS.get(point.weights, PLAIN), point.has_experts)
        groups[name].append(abs(np.exp(pair) - 1))
    off = {name: np.mean(pairs, axis=0) for name, pairs in sorted(groups.items())}
    found.constants["errors"] = {
        name: {"points": len(groups[name]), "ttft": round(ttft, 3), "itl": round(itl, 3)}
        for name, (ttft, itl) in off.items()
    }
    path = Path("cluster/fitted.json")
    path.write_text(json.dumps(found.constants, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
