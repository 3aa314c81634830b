"""Turns a request's sampling parameters into the setup that ranks get: token ids for texts, grammars for formats."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.sampling_setup import SamplingSetup, Thinking
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.text.tokenizer import Tokenizer


def make_setup(
    params: SamplingParams, tokenizer: Tokenizer | None, eos_token_ids: Collection[int], vocab_size: int
) -> SamplingSetup | None:
    """The sampling setup of sequences with `params`; None if ranks need none.

    Compiling a grammar for the first time may take seconds. Raises RequestError.
    """
    for name, ids in (
        ("logit_bias", (token_id for token_id, _ in params.logit_bias)),
        ("logprob_token_ids", params.logprob_token_ids),
        ("stop_token_ids", params.stop_token_ids),
    ):
        _check_vocabulary(name, ids, vocab_size)
    if params.is_plain:
        return None
    thinking = _thinking(tokenizer) if params.reasoning != "none" else None
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    outputs = params.structured_outputs
    return SamplingSetup(
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        params.logit_bias,
        params.min_tokens,
        tuple({*eos, *params.stop_token_ids}),
        tuple(eos_token_ids),
        _bad_words(params.bad_words, tokenizer),
        params.logprob_token_ids,
        thinking,
        params.reasoning if thinking else "none",
        params.thinking_token_budget,
        compile_grammar(outputs) if outputs is not None else None,
    )


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    foreign = next((token_id for token_id in token_ids if token_id >= vocab_size), None)
    if foreign is not None:
        raise RequestError(
            f"{name} has token id {foreign}, outside the vocabulary of {vocab_size}", param=name
        )


def _thinking(tokenizer: Tokenizer | None) -> Thinking | None:
    if tokenizer is None:
        return None
    opens, closes = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    if opens is None or closes is None:
        return None
    spelled = ((tokenizer.encode("\n" * count), count) for count in (1, 2))
    return Thinking(opens, closes, tuple((ids[0], count) for ids, count in spelled if len(ids) == 1))


def _bad_words(words: tuple[str, ...], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, with and without a space before it."""
    if words and tokenizer is None:
        raise RequestError("bad_words need a tokenizer, which this model lacks", param="bad_words")
    if tokenizer is None:
        return ()
    spelled = {tuple(tokenizer.encode(text)) for word in words for text in (word, f" {word.lstrip()}")}
    return tuple(sorted(spelled))
