"""Whether a request fits the model and its context, before it is queued."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.sequence import is_stop
from qwen3_dist.errors import ConfigError, ContextLengthError, RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig


def check_context(config: EngineConfig, model_config: ModelConfig) -> None:
    """Raises ConfigError if `config` asks for a longer context than the model has."""
    if config.max_model_len is not None and config.max_model_len > model_config.context_length:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's context of {model_config.context_length}; "
            "lower it, or extend the context with YaRN: rope_scaling in hf_overrides"
        )


def max_model_len(config: EngineConfig, model_config: ModelConfig, capacity_tokens: int) -> int:
    """The context in tokens, prompt and output together. Raises ConfigError if the KV cache is too small for it."""
    wanted = config.max_model_len
    if wanted is None:
        return min(model_config.context_length, capacity_tokens)
    if wanted > capacity_tokens:
        raise ConfigError(
            f"max_model_len={wanted} does not fit the KV cache of {capacity_tokens} tokens; lower it or give "
            "the cache more memory"
        )
    return wanted


def check_prompt(
    prompt_token_ids: list[int],
    params: SamplingParams,
    pooling: PoolingParams | None,
    config: ModelConfig,
    context: int,
) -> None:
    """Raises RequestError if the prompt is empty, has ids outside the vocabulary or is too long for the `context` in
    tokens, if `pooling` asks for too many dimensions, or if the model cannot generate."""
    if config.has_score and pooling is None:
        raise RequestError(
            "this model scores texts and cannot generate; use /v1/rerank, /v1/score or LLM.rerank",
            param="model",
        )
    longest = config.emb_dim
    if pooling is not None and (pooling.dimensions or 1) > longest:
        raise RequestError(
            f"dimensions={pooling.dimensions} is more than the {longest} of this model; ask for at most "
            f"{longest}",
            param="dimensions",
        )
    if not prompt_token_ids:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    generates = params.max_tokens != 0
    if len(prompt_token_ids) + generates > context:
        raise ContextLengthError(
            f"the prompt has {len(prompt_token_ids)} tokens and the context holds {context}"
            f"{', the output included' if generates else ''}; shorten the prompt",
            "prompt",
            len(prompt_token_ids),
            context,
            output_tokens=int(len(prompt_token_ids) == context),
        )
    _check_vocabulary(prompt_token_ids, config.vocab_size)


def check_output(
    output: Sequence[int],
    prompt_token_ids: list[int],
    params: SamplingParams,
    config: ModelConfig,
    context: int,
    eos_token_ids: frozenset[int],
) -> None:
    """Raises RequestError if no token can follow the `output` of another engine here, unless that output is complete:
    ids are outside the vocabulary, or prompt and output fill the `context` in tokens."""
    _check_vocabulary(output, config.vocab_size)
    room = context - len(prompt_token_ids) - len(output)
    if room > 0 or not output:
        return
    is_complete = params.max_tokens is not None and len(output) >= params.max_tokens
    if not is_complete and not is_stop(output[-1], params, eos_token_ids):
        raise RequestError(
            f"the answer cannot go on here: the {len(prompt_token_ids)} tokens of the prompt and the "
            f"{len(output)} generated so far fill the context of {context}; send the request again with a lower "
            "max_tokens",
            "prompt",
            code="context_length_exceeded",
        )


def _check_vocabulary(token_ids: Iterable[int], vocab_size: int) -> None:
    foreign = next((t for t in token_ids if not 0 <= t < vocab_size), None)
    if foreign is not None:
        raise RequestError(f"token id {foreign} is outside the vocabulary of {vocab_size}", param="prompt")
