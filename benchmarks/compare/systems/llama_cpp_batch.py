"""llama.cpp through llama-cpp-python's C interface: `llama_cpp_batch.py MODEL WORK.json [TYPE]`.

MODEL is the directory of `model.gguf`, which `write_gguf.py` writes. It is quantised to TYPE first, for example Q8_0.
The time of sampling is not included.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp
from driving import drive

BATCH = 2048


def quantized(file: Path, kind: str) -> Path:
    """The file with weights of this type, which is written unless it exists."""
    made = file.with_name(f"model-{kind}.gguf")
    if not made.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        part = made.with_suffix(".tmp")
        done = llama_cpp.llama_model_quantize(str(file).encode(), str(part).encode(), ctypes.byref(options))
        assert done == 0, f"llama.cpp cannot quantise to {kind}"
        part.rename(made)
    return made


def main(path: str, work_file: str, kind: str = "") -> None:
    work = json.loads(Path(work_file).read_text())
    file = Path(path) / "model.gguf"
    file = quantized(file, kind) if kind else file
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 8192, BATCH, 512, 16
    options.n_threads = options.n_threads_batch = work["threads"]
    options.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, options)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode() -> None:
        assert llama_cpp.llama_decode(context, batch) == 0
        batch.n_tokens = 0

    def put(token: int, position: int, sequence: int, wanted: bool) -> None:
        at = batch.n_tokens
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.n_tokens = at + 1

    def seconds(prompts: list, output_len: int) -> float:
        """Feeds fixed tokens back instead of sampled ones, which takes the same time."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        for sequence, prompt in enumerate(prompts):
            if batch.n_tokens + len(prompt) > BATCH:
                decode()
            for position, token in enumerate(prompt):
                put(token, position, sequence, position == len(prompt) - 1)
        decode()
        for step in range(output_len - 1):
            for sequence, prompt in enumerate(prompts):
                put((prompt[0] + step) % vocab_size, len(prompt) + step, sequence, True)
            decode()
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - started

    batch.n_tokens = 0
    drive(work, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
