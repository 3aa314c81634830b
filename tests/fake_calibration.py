"""`calibrate` on GPUs that are not there: `python -m tests.fake_calibration` prints what it found and asked as JSON.

Tensors have no numbers and kernels are compiled but not launched (tests/fake_gpu.py), so times are those of the host.
What ranks would measure, collectives by NCCL and steps of engines, is put in their place.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch

from cluster.calibration import calibrate as calibration
from cluster.calibration import collective_probe, probes, step_probe
from cluster.hardware import as_dict
from qwen3_dist.layout import Layout
from tests.fake_gpu import fake_gpu
from tests.fake_rank import triton_ops, without_numbers

CARD, CARD_BYTES, CARDS = 90, 80 * 10**9, 2
LATENCY_S, BYTES_PER_S = 5e-6, 2e11
SIZES = probes.Sizes(inner=128, outputs=256, matrices=2, read_bytes=1 << 20, expert_columns=64, repeats=2)


def nccl(world: int, device: str) -> dict[str, list[tuple[int, float]]]:
    assert (world, device) == (2, "cuda")
    return {
        kind: [(size, LATENCY_S + 0.5 * size / BYTES_PER_S) for size in collective_probe.BYTES]
        for kind in collective_probe.COLLECTIVES
    }


def steps(layout: Layout, device: str) -> list[tuple[int, int, float]]:
    assert device == "cuda"
    ranks_s = 0.0 if layout.world == 1 else 4e-4
    return [(layers, batch, 1e-3 + 2e-5 * layers + ranks_s) for layers in (2, 18) for batch in (1, 4, 16)]


def main() -> None:
    synchronized: Counter[str] = Counter()

    class Properties:
        multi_processor_count, total_memory = 108, CARD_BYTES

    said: list[str] = []
    fakes: dict[tuple[Any, str], Any] = {
        (torch.cuda, "device_count"): lambda: CARDS,
        (torch.cuda, "get_device_properties"): lambda *_: Properties,
        (torch.cuda, "synchronize"): lambda *_: synchronized.update(["calls"]),
        (collective_probe, "measure"): nccl,
        (step_probe, "decode_steps"): steps,
        (step_probe, "prompt_step"): lambda device: 5e-3,
        (probes, "choose_ops"): lambda device, dtype, attention=None: triton_ops(dtype),
    }
    for name in ("row_seconds", "expert_seconds", "attention_seconds"):
        fakes[probes, name] = getattr(probes, name).__wrapped__  # without inference mode
    with fake_gpu(CARD) as watch, contextlib.ExitStack() as stack:
        stack.enter_context(without_numbers())
        for (owner, name), fake in fakes.items():
            stack.enter_context(patch.object(owner, name, fake))
        found = calibration.calibrate("cuda", said.append, SIZES, rows=(1, 16, 64))
        kernels, waits = dict(watch.kernels), list(watch.waits)
    print(
        json.dumps(
            {
                "cluster": as_dict(found.cluster),
                "measured": sorted(found.measured),
                "machine": found.about["machine"],
                "said": said,
                "synchronized": synchronized["calls"],
                "kernels": kernels,
                "waits": waits,
            }
        )
    )


if __name__ == "__main__":
    main()
