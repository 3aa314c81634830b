"""The fields of a body that say how tokens are drawn and when they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.sampling_params import MAX_LOGPROBS
from serve_app.apis.shared.kinds import (
    BOOL,
    Either,
    Field,
    ListOf,
    Plain,
    integer,
    number,
    number_above,
)

_MOST_STRINGS, _MOST_CHARS, _MOST_TOKENS = 16, 1000, 1024


def _is_bias(value: Mapping[str, Any]) -> bool:
    return len(value) <= _MOST_TOKENS and all(
        token.isdecimal() and len(token) < 10 and _BIAS.accepts(bias) for token, bias in value.items()
    )


_BIAS = number(-100, 100)
_STRING = Plain(
    f"a string of 1 to {_MOST_CHARS} characters",
    {"type": "string", "minLength": 1, "maxLength": _MOST_CHARS},
    lambda value: 0 < len(value) <= _MOST_CHARS,
)
STOP_STRINGS = ListOf(
    _STRING, f"a list of up to {_MOST_STRINGS} strings of 1 to {_MOST_CHARS} characters", most=_MOST_STRINGS
)
_STOP = f"a string of 1 to {_MOST_CHARS} characters or a list of up to {_MOST_STRINGS} of them"
_TOKEN_IDS = ListOf(integer(0), f"a list of up to {_MOST_TOKENS} token ids", most=_MOST_TOKENS)
_WORDS = ListOf(_STRING, f"a list of up to {_MOST_TOKENS} strings", most=_MOST_TOKENS)
_BIASES = Plain(
    f"an object of up to {_MOST_TOKENS} token ids with numbers from -100 to 100",
    {
        "type": "object",
        "maxProperties": _MOST_TOKENS,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": _BIAS.schema,
    },
    _is_bias,
)
# Names as SamplingParams has them.
SAMPLING: dict[str, Field] = {
    "n": Field(integer(1, 128), "Choices per prompt."),
    "temperature": Field(number(0, 2), "0 always takes the likeliest token."),
    "top_p": Field(number_above(0, 1), "Keeps the likeliest tokens that have this probability together."),
    "top_k": Field(integer(-1), "Keeps so many of the likeliest tokens; 0 and -1 keep all."),
    "min_p": Field(number(0, 1), "Keeps tokens at least this probable, relative to the likeliest."),
    "presence_penalty": Field(number(-2, 2), "Taken off the logits of tokens that came already."),
    "frequency_penalty": Field(number(-2, 2), "Taken off a token's logit for each time it came."),
    "repetition_penalty": Field(
        number_above(0, 10), "Divides the positive logits of tokens in prompt and output."
    ),
    "seed": Field(integer(-(2**63), 2**63 - 1), "Makes a sampled answer repeatable."),
    "stop": Field(
        Either(_STOP, (_STRING, STOP_STRINGS)),
        "Texts that end the answer; they are looked for in all that is generated, reasoning included.",
    ),
    "stop_token_ids": Field(_TOKEN_IDS, "Tokens that end the answer."),
    "include_stop_str_in_output": Field(BOOL, "Whether the stop string is shown."),
    "ignore_eos": Field(BOOL, "Goes on after the end-of-sequence token."),
    "min_tokens": Field(integer(0), "Nothing ends the answer before so many tokens."),
    "logit_bias": Field(_BIASES, "Added to the logits of tokens, by token id."),
    "bad_words": Field(_WORDS, "Texts that are never generated."),
    "prompt_logprobs": Field(integer(0, MAX_LOGPROBS), "Log-probabilities of the prompt's tokens."),
    "skip_special_tokens": Field(BOOL, "Leaves special tokens out of the text."),
    "spaces_between_special_tokens": Field(BOOL, ignored="byte-level tokenizers put no spaces there."),
    "thinking_token_budget": Field(integer(0), "Ends thinking after so many tokens."),
}
