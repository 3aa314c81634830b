"""This project: `ours.py MODEL WORK.json LAYOUT [SETTING=VALUE ...]`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from driving import drive

from qwen3_dist import LLM, SamplingParams


def main(model: str, work_file: str, layout: str, *settings: str) -> None:
    work = json.loads(Path(work_file).read_text())
    more: dict[str, Any] = dict(setting.split("=", 1) for setting in settings)
    executor = "in_process" if layout == "tp=1" else "processes"
    with LLM(
        model,
        layout=layout,
        executor=executor,
        max_model_len=work["max_model_len"],
        prefix_caching=False,
        use_tqdm=False,
        **more,
    ) as llm:

        def seconds(prompts: list[list[int]], output_len: int) -> float:
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            taken = time.perf_counter() - started
            assert all(len(output.token_ids) == output_len for output in outputs)
            return taken

        drive(work, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
