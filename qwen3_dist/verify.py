"""Compares a model's logits and hidden states with transformers' for the same checkpoint, on a CPU.

Legend: T tokens of a prompt, D emb_dim, V vocab_size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.expert_placement import even_placements
from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.dequantised import dequantised
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.worker import kv_cache
from qwen3_dist.worker.shard import load_shard

_TEXTS = (
    "The capital of France is",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot = items[0]\n",
    "In 1905 Albert Einstein published four papers. The first explained the photoelectric effect, the second Brownian "
    "motion, the third special relativity, and the fourth the equivalence of mass and energy. Each of them",
)
# Of these transformers reads one. Others, as those of `qwen3-dist shard`, are read for it.
_READABLE = ("model.safetensors", "model.safetensors.index.json")
_LENGTHS = (1, 9, 48)  # of prompts of arbitrary ids, without a tokenizer
_BLOCK_SIZE = 16
# What rounding explains in fp32: the KL divergence of a position, and the error of hidden states over their norm.
_KL, _HIDDEN = 1e-6, 1e-3
_Loaded = Callable[[Sequence[int]], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Comparison:
    """How far our results are from transformers'. KL divergences are in nats, from transformers' distribution to ours,
    of single positions. `layers`: each block's largest error over all prompts, the norm of the difference over that of
    transformers' hidden states; () if they were not compared. `first_apart`: the first block, or else the first
    prompt and position, whose error is more than rounding explains; "" if there is none."""

    tokens: int
    mean_kl: float
    largest_kl: float
    largest_logit_error: float
    same_argmax: float
    layers: tuple[float, ...]
    first_apart: str


def verify(path: Path, layers: bool = False) -> Comparison:
    """Compares the model at `path`, computed in fp32 by both, and with `layers` each block's hidden states.

    Quantised weights are compared with the weights that their codes stand for. One of the two models is in memory at
    a time. Raises ConfigError without transformers or for a model that does not generate, and what loading raises.
    """
    config = ModelConfig.from_directory(path)
    files = CheckpointFiles(path)
    if config.has_score or files.is_headless:
        raise ConfigError("verify compares logits, which this model lacks; give one that generates")
    _transformers()
    prompts = _prompts(path, config)
    with torch.inference_mode():
        ours = _run(_ours(path, config, layers), prompts)
        theirs = _run(_theirs(path, config, files, layers), prompts)
        return _compared(ours, theirs)


def differences(path: Path, quantize: str, other: Path) -> Comparison:
    """How far the logits of the model at `path`, with its weights rounded as the setting `quantize` says, are from
    those of the one at `other`. Both are computed in fp32 with this project's kernels."""
    config = ModelConfig.from_directory(path)
    prompts = _prompts(path, config)
    with torch.inference_mode():
        ours = _run(_ours(path, config, False, quantize), prompts)
        return _compared(ours, _run(_ours(other, ModelConfig.from_directory(other), False), prompts))


def _run(loaded: _Loaded, prompts: Sequence[Sequence[int]]) -> list[tuple[Tensor, list[Tensor]]]:
    return [loaded(prompt) for prompt in prompts]


def _prompts(path: Path, config: ModelConfig) -> list[list[int]]:
    tokenizer = Tokenizer.from_directory(path)
    if tokenizer is not None:
        return [tokenizer.encode(text) for text in _TEXTS]
    return [[(7919 * place + 13) % config.vocab_size for place in range(length)] for length in _LENGTHS]


def _compared(
    ours: Sequence[tuple[Tensor, list[Tensor]]], theirs: Sequence[tuple[Tensor, list[Tensor]]]
) -> Comparison:
    divergences, errors, same, layers = [], [], [], list[list[float]]()
    for (logits, hidden), (expected, their_hidden) in zip(ours, theirs, strict=True):
        logs, expected_logs = (each.double().log_softmax(-1) for each in (logits, expected))
        divergences.append((expected_logs.exp() * (expected_logs - logs)).sum(-1).clamp(min=0))
        errors.append((logits - expected).abs().max())
        same.append(logits.argmax(-1) == expected.argmax(-1))
        pairs = zip(hidden, their_hidden, strict=True)
        layers.append([float((mine - other).norm() / other.norm()) for mine, other in pairs])
    of_layers = tuple(max(each) for each in zip(*layers, strict=True))
    everything = torch.cat(divergences)
    return Comparison(
        tokens=len(everything),
        mean_kl=float(everything.mean()),
        largest_kl=float(everything.max()),
        largest_logit_error=float(torch.stack(errors).max()),
        same_argmax=float(torch.cat(same).float().mean()),
        layers=of_layers,
        first_apart=_first_apart(of_layers, divergences),
    )


def _first_apart(layers: Sequence[float], divergences: Sequence[Tensor]) -> str:
    for layer, error in enumerate(layers):
        if not error <= _HIDDEN:
            return f"block {layer}"
    for prompt, of_positions in enumerate(divergences):
        for position in (~(of_positions <= _KL)).nonzero()[:1].flatten().tolist():
            return f"prompt {prompt}, position {position}" + (", after the last block" if layers else "")
    return ""


def _ours(path: Path, config: ModelConfig, layers: bool, quantize: str = "none") -> _Loaded:
    settings = EngineConfig(model=str(path), dtype="float32", device="cpu", quantize=quantize)
    cpu, alone = torch.device("cpu"), ParallelContext.single()
    model = load_shard(settings, path, even_placements(config, 1), alone, cpu, None)
    model.kv_cache_dtype = None  # transformers keeps keys and values in fp32

    def run(prompt: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        batch = _batch(prompt)
        _, logits = model(batch, kv_cache.allocate(model, batch.block_tables.shape[1], _BLOCK_SIZE))
        hidden: list[Tensor] = []
        if layers:  # block by block: one call of all blocks shows no hidden states between them
            whole, model.whole_stage = model.whole_stage, None
            hooks = [block.register_forward_hook(_keep(hidden)) for block in model.blocks]
            model(batch, kv_cache.allocate(model, batch.block_tables.shape[1], _BLOCK_SIZE))
            for hook in hooks:
                hook.remove()
            model.whole_stage = whole
        return logits, hidden

    return run


def _batch(prompt: Sequence[int]) -> StepBatch:
    """One sequence, of which the logits of all tokens are wanted."""
    length, rows = len(prompt), torch.arange(len(prompt))
    return StepBatch(
        token_ids=torch.tensor(prompt),
        positions=rows,
        slots=rows,
        block_tables=torch.arange(-(-length // _BLOCK_SIZE), dtype=torch.int32)[None],
        table_rows=torch.tensor([0]),
        context_lens=torch.tensor([length]),
        query_starts=torch.tensor([0, length]),
        query_lens=(length,),
        host_context_lens=(length,),
        num_decodes=int(length == 1),
        all_to_all=False,
        logits_rows=rows,
        group_tokens=(length,),
    )


def _keep(hidden: list[Tensor]) -> Callable[..., None]:
    def hook(module: Any, given: Any, found: Any) -> None:
        x = found[0] if isinstance(found, tuple) else found
        hidden.append(x.reshape(-1, x.shape[-1]).clone())

    return hook


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("verify needs transformers; pip install 'transformers>=5.17'") from None
    return transformers


def _theirs(path: Path, config: ModelConfig, files: CheckpointFiles, layers: bool) -> _Loaded:
    library = _transformers()
    library.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if config.num_experts:
        options["experts_implementation"] = "eager"
    if config.quantization is None and any((path / name).exists() for name in _READABLE):
        model = library.AutoModelForCausalLM.from_pretrained(path, **options)
    else:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        plain = {name: raw[name] for name in raw if name not in ("quantization_config", "compression_config")}
        options["config"] = library.AutoConfig.for_model(**plain)
        tensors = dict(dequantised(config, files))
        which = library.Qwen3MoeForCausalLM if config.num_experts else library.Qwen3ForCausalLM
        model = which.from_pretrained(None, state_dict=tensors, **options)
    model.eval()

    def run(prompt: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        hidden: list[Tensor] = []
        hooks = [each.register_forward_hook(_keep(hidden)) for each in model.model.layers] if layers else []
        logits = model(torch.tensor([list(prompt)]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return logits, hidden

    return run
