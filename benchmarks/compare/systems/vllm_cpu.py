"""vLLM's CPU build: `vllm_cpu.py MODEL WORK.json TP`."""

import json
import os
import sys
import time
from pathlib import Path

from driving import drive


def main(path: str, work_file: str, tp: str) -> None:
    work = json.loads(Path(work_file).read_text())
    cores = sorted(os.sched_getaffinity(0))[: work["threads"]]
    # By default vLLM uses one core. "a-b" is one rank on cores a to b, "a|b" are two ranks.
    binding = f"{cores[0]}-{cores[-1]}" if tp == "1" else "|".join(map(str, cores[: int(tp)]))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        dtype="bfloat16",
        tensor_parallel_size=int(tp),
        max_model_len=work["max_model_len"],
        max_num_seqs=32,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def seconds(prompts: list, output_len: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        taken = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == output_len for output in outputs)
        return taken

    drive(work, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
