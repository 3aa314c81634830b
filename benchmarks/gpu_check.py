"""Everything a GPU must show, in one call under ten minutes, written as one JSON: `make gpu-check`.

    python -m benchmarks.gpu_check [--device cpu] [--layers N] [--out FILE]

First the layouts of small models against the unsharded reference (several ranks share the card), with CUDA
graphs and without; then rates of random-weight models as shares of the card's limits, and transformers'
where it is installed. `--device cpu` runs the same code where no GPU is, on smaller rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.checkpoints import SHAPES, written
from benchmarks.compare.limits import measure_gpu, measure_machine, row_limit
from benchmarks.compare.workload import Row
from benchmarks.gpu_experts import measure_experts
from benchmarks.record import RESULTS
from qwen3_dist import LLM, SamplingParams
from qwen3_dist.benchmark import Workload, measure, warm_up
from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.engine import Engine
from qwen3_dist.layers.gpu_attention import gpu_attention
from qwen3_dist.machine import hardware, versions
from qwen3_dist.reference import load_reference
from qwen3_dist.settings import EngineConfig

_SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
_SMALL_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
_PROMPTS = [list(range(3, 200)), [7, 1, 150, 198, 0], [42], list(range(100, 140))]
_LAYOUTS = {
    "dense": ("tp=1", "tp=2", "tp=4"),
    "moe": ("tp=1", "tp=2,ep=2", "tp=4,ep=2", "tp=4,ep=4"),
}
_LENGTH = 24
_30B_A3B = {
    **SHAPES["moe"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
}


def check_parity(kind: str, device: str, folder: Path) -> list[dict[str, Any]]:
    """Greedy tokens in fp32 against the reference on the CPU, and logprobs of bf16 against fp32's."""
    shape = {**SHAPES[kind], **_SMALL, **(_SMALL_EXPERTS if kind == "moe" else {})}
    path = written(shape, folder / kind)
    reference = load_reference(path)
    expected = [reference.generate_greedy(prompt, _LENGTH) for prompt in _PROMPTS]
    ways: list[dict[str, Any]] = [{"layout": layout, "dtype": "float32"} for layout in _LAYOUTS[kind]]
    ways += [{"layout": "tp=1", "dtype": dtype, "cuda_graphs": False} for dtype in ("float32", "bfloat16")]
    ways += [
        {"layout": "tp=1", "dtype": "bfloat16"},
        {"layout": "tp=1", "dtype": "bfloat16", "quantize": "int8"},
    ]
    if kind == "moe":
        ways += [{"layout": "tp=2,ep=2", "dtype": "float32", "moe_dispatch": "all_to_all"}]
    rows = []
    for way in ways:
        form = "in_process" if way["layout"] == "tp=1" else "processes"
        params = SamplingParams(temperature=0, max_tokens=_LENGTH, ignore_eos=True, logprobs=1)
        try:
            with LLM(str(path), device=device, executor=form, num_blocks=128, use_tqdm=False, **way) as llm:
                outputs = llm.generate(_PROMPTS, params, use_tqdm=False)
            same = sum(out.token_ids == tokens for out, tokens in zip(outputs, expected, strict=True))
            row = {"equal_sequences": f"{same} of {len(expected)}", "passed": same == len(expected)}
            if way["dtype"] != "float32":
                error = _first_logprob_error(reference, outputs)
                most = 0.3 if "quantize" in way else 0.1
                row = {**row, "logprob_error": round(error, 4), "passed": error < most}
        except Exception as error:  # the other ways are still worth knowing
            row = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
        rows.append({"model": kind, **way, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _first_logprob_error(reference: Any, outputs: list[Any]) -> float:
    """Largest difference of the first token's log-probability; later ones may follow other tokens."""
    errors = []
    for prompt, output in zip(_PROMPTS, outputs, strict=True):
        entry = output.logprobs[0]
        logprobs = reference(torch.tensor(prompt))[-1].log_softmax(-1)
        errors.append(abs(float(logprobs[entry.token_id]) - entry.logprob))
    return max(errors)


def measure_rates(name: str, shape: dict[str, Any], device: str, folder: Path) -> list[dict[str, Any]]:
    """Decoding at several batch sizes, as a share of what the device's limits allow."""
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(shape))
    config = ModelConfig.from_directory(path)
    machine = measure_gpu() if device == "cuda" else measure_machine()
    rows = []
    batches = (1, 32, 256) if device == "cuda" else (1, 4)
    for graphs in (True, False):
        engine = Engine(
            EngineConfig(
                model=str(path),
                load_format="random",
                device=device,
                executor="in_process",
                max_model_len=512,
                max_num_seqs=batches[-1],
                prefix_caching=False,
                cuda_graphs=graphs,
            )
        )
        try:
            warm_up(engine)
            for batch in batches:
                row = Row(batch, 32, 64 if device == "cuda" else 4)
                figures = measure(engine, Workload(batch, row.input_len, row.output_len))
                share = row_limit(config, row, machine) / (
                    batch * row.output_len / figures["output_tokens_per_s"]
                )
                kept = {key: figures[key] for key in ("output_tokens_per_s", "ttft_ms", "itl_ms")}
                rows.append(
                    {"model": name, "row": str(row), "graphs": graphs, **kept, "of_limit": round(share, 3)}
                )
                print(json.dumps(rows[-1]), flush=True)
        finally:
            engine.shutdown()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure_transformers(name: str, shape: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The same rows through transformers' generate; says so where it is not installed."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return [{"model": name, "system": "transformers", "error": "not installed"}]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16).eval()
    rows = []
    for batch in (1, 32) if device == "cuda" else (1,):
        ids = torch.randint(1000, shape["vocab_size"], (batch, 32), device=device)
        length = 64 if device == "cuda" else 4
        options: dict[str, Any] = {
            "max_new_tokens": length,
            "min_new_tokens": length,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            rate = batch * length / (time.perf_counter() - started)
        rows.append(
            {
                "model": name,
                "system": "transformers",
                "row": str(Row(batch, 32, length)),
                "output_tokens_per_s": round(rate, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=24, help="layers of the 30B-A3B shape")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/gpu-check-CARD.json")
    options = parser.parse_args()
    device = options.device
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions(),
    }
    if device == "cuda":
        backend = gpu_attention(torch.device("cuda", 0), torch.bfloat16, 16, 8, 128, 16)
        about["attention"] = backend.__name__
    shapes = {"Qwen3-0.6B": SHAPES["dense"]}
    if device == "cuda":
        shapes[f"Qwen3-30B-A3B, {options.layers} layers"] = {
            **_30B_A3B,
            "num_hidden_layers": options.layers,
        }
    with tempfile.TemporaryDirectory() as folder:
        parity = [row for kind in _LAYOUTS for row in check_parity(kind, device, Path(folder))]
        rates = [
            row for name, shape in shapes.items() for row in measure_rates(name, shape, device, Path(folder))
        ]
    experts = []
    if device == "cuda":
        experts = measure_experts(num_experts=128, choices=8, dim=2048, columns=768)  # of Qwen3-30B-A3B
        for row in experts:
            print(json.dumps(row), flush=True)
    peers = [row for name, shape in shapes.items() for row in measure_transformers(name, shape, device)]
    card = hardware()["gpus"][0].replace(" ", "-") if device == "cuda" else "cpu"
    out = options.out or RESULTS / f"gpu-check-{card}.json"
    out.write_text(
        json.dumps({**about, "parity": parity, "rates": rates, "experts": experts, "peers": peers}, indent=1)
        + "\n"
    )
    failed = [row for row in parity if not row["passed"]]
    failed += [row for row in experts if row["error"] > (0.03 if "int8" in row["experts by"] else 0.01)]
    checks = len(parity) + len(experts)
    print(f"{checks - len(failed)} of {checks} parity checks passed; written to {out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
