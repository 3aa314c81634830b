"""Output tokens/s of streamed completions over HTTP with many clients, against the same engine offline.

    python -m benchmarks.http_overhead [--clients 32] [--output-len 128] [--haproxy]

Server, engine and clients share this machine's cores. Besides the bundled model, whose steps take one or two
milliseconds, it runs random weights of Qwen3's proportions, cut so that a step takes about 20 ms: once with the rank
on all cores, and once with one core left to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.record import keep
from cluster.ray_private import HAPROXY
from qwen3_dist import LLM, SamplingParams
from serve_app.launch.foreground import running_service
from serve_app.settings import read_service_config

INPUT_LEN = 16
TURNS = 3
PORT = 8793
# Models with steps of about 20 ms on two cores, and on one: name, changes to Qwen3-0.6B's config, settings.
TWENTY_MS: tuple[tuple[str, dict[str, int], dict[str, int]], ...] = (
    ("Qwen3-0.6B cut to 1 layer", {"num_hidden_layers": 1}, {}),
    (
        "Qwen3-0.6B cut to 1 layer and half its vocabulary",
        {"num_hidden_layers": 1, "vocab_size": 75968},
        {"threads_per_rank": max(1, (os.cpu_count() or 2) - 1)},
    ),
)


def prompts(clients: int) -> list[list[int]]:
    return [[100 + client, *range(200, 200 + INPUT_LEN - 1)] for client in range(clients)]


async def stream(url: str, body: dict[str, Any]) -> int:
    """Streams one completion; returns its number of tokens. Uses a bare socket, since a client library would use more
    CPU time than the server."""
    address = urlparse(url)
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200") and b"[DONE]" in answer, answer[:500]
    usage = answer.rpartition(b'"completion_tokens":')[2]
    return int(usage[: usage.index(b",")])


async def all_clients(url: str, model: str, clients: int, output_len: int) -> int:
    bodies = [
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt in prompts(clients)
    ]
    return sum(await asyncio.gather(*(stream(url, body) for body in bodies)))


def client_process(url: str, model: str, clients: int, output_len: int, rates: Any) -> None:
    asyncio.run(all_clients(url, model, clients, 8))
    for _ in range(TURNS):
        started = time.perf_counter()
        tokens = asyncio.run(all_clients(url, model, clients, output_len))
        rates.put(tokens / (time.perf_counter() - started))


def served_rate(settings: dict[str, Any], clients: int, output_len: int) -> float:
    context = multiprocessing.get_context("spawn")
    rates = context.Queue()
    config = read_service_config({**settings, "port": PORT, "model_name": "m"})
    with running_service(config) as service:
        client = context.Process(target=client_process, args=(service.url, "m", clients, output_len, rates))
        client.start()
        found = [rates.get(timeout=600) for _ in range(TURNS)]
        client.join()
    return statistics.median(found)


def offline_rate(settings: dict[str, Any], clients: int, output_len: int) -> float:
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    with LLM(use_tqdm=False, **settings) as llm:
        llm.generate(prompts(clients), replace(params, max_tokens=8), use_tqdm=False)
        rates = []
        for _ in range(TURNS):
            started = time.perf_counter()
            llm.generate(prompts(clients), params, use_tqdm=False)
            rates.append(clients * output_len / (time.perf_counter() - started))
    return statistics.median(rates)


def rows(
    name: str, settings: dict[str, Any], clients: int, output_len: int, parts: list[int]
) -> list[dict[str, Any]]:
    """A row for each of `parts`: the value of stream_parts_per_s; 0 is unlimited."""
    offline = offline_rate(settings, clients, output_len)
    found = []
    for most in parts:
        served = served_rate({**settings, "stream_parts_per_s": most}, clients, output_len)
        found.append(
            {
                "model": name,
                "clients": clients,
                "threads": settings.get("threads_per_rank") or os.cpu_count(),
                "proxy": "HAProxy" if os.environ.get(HAPROXY) == "1" else "Serve",
                "stream_parts_per_s": most,
                "offline_tokens_per_s": round(offline),
                "offline_step_ms": round(clients / offline * 1e3, 1),
                "http_tokens_per_s": round(served),
                "http_over_offline": round(served / offline, 2),
                "overhead_us_per_token": round((1 / served - 1 / offline) * 1e6),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--parts", type=int, nargs="*", default=[0, 500], help="stream_parts_per_s")
    parser.add_argument("--haproxy", action="store_true", help="use Serve's HAProxy")
    args = parser.parse_args()
    os.environ[HAPROXY] = str(int(args.haproxy))
    common = {"num_blocks": 2048, "prefix_caching": False, "max_num_seqs": args.clients}
    how = (args.clients, args.output_len, args.parts)
    found = rows("bundled", common, *how)
    for name, cut, settings in TWENTY_MS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**SHAPES["dense"], **cut}))
            found += rows(name, {**common, **settings, "model": folder, "load_format": "random"}, *how)
    keep("http-overhead-haproxy" if args.haproxy else "http-overhead", found)


if __name__ == "__main__":
    main()
