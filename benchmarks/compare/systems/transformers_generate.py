"""transformers' `generate`: `transformers_generate.py MODEL WORK.json`."""

import json
import sys
import time
from pathlib import Path

import torch
from driving import drive
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main(path: str, work_file: str) -> None:
    work = json.loads(Path(work_file).read_text())
    torch.set_num_threads(work["threads"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def seconds(prompts: list, output_len: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
        taken = time.perf_counter() - started
        assert out.shape == (ids.shape[0], ids.shape[1] + output_len)
        return taken

    drive(work, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
