"""The sampling and stopping fields of request bodies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from qwen3_dist.sampling_params import MAX_LOGPROBS
from serve_app.apis.shared.body import Body, ByType, Must, Range, about, ignored

_MAX_STRINGS, _MAX_CHARS, _MAX_TOKENS = 16, 1000, 1024
_String = Annotated[
    str,
    Field(min_length=1, max_length=_MAX_CHARS),
    Must(f"a string of 1 to {_MAX_CHARS} characters"),
]
StopStrings = Annotated[
    list[_String],
    Must(f"a list of up to {_MAX_STRINGS} strings of 1 to {_MAX_CHARS} characters", max_items=_MAX_STRINGS),
]
_Bias = Annotated[float, Range(-100, 100)]
_Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], _Bias],
    Field(max_length=_MAX_TOKENS),
    Must(f"an object of up to {_MAX_TOKENS} token ids with numbers from -100 to 100"),
    Field(json_schema_extra={"additionalProperties": False}),
]
Temperature = Annotated[float, Range(0, 2), about("0 always picks the likeliest token.")]
TopP = Annotated[
    float,
    Range(0, 1, exclusive_low=True),
    about("Keeps the fewest likeliest tokens whose probabilities add up to this."),
]


class SamplingBody(Body):
    """Fields with the names of SamplingParams. An absent field has the value that the checkpoint recommends."""

    n: Annotated[int, Range(1, 128), about("Choices per prompt.")] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: (
        Annotated[int, Range(-1), about("Keeps this many of the likeliest tokens; 0 and -1 keep all.")] | None
    ) = None
    min_p: (
        Annotated[
            float,
            Range(0, 1),
            about("Keeps tokens with at least this share of the likeliest token's probability."),
        ]
        | None
    ) = None
    presence_penalty: (
        Annotated[
            float, Range(-2, 2), about("Subtracted from the logits of tokens that the output already has.")
        ]
        | None
    ) = None
    frequency_penalty: (
        Annotated[
            float,
            Range(-2, 2),
            about("Subtracted from a token's logit for each time that the output has it."),
        ]
        | None
    ) = None
    repetition_penalty: (
        Annotated[
            float,
            Range(0, 10, exclusive_low=True),
            about("Divides positive logits, and multiplies negative ones, of tokens in prompt and output."),
        ]
        | None
    ) = None
    seed: Annotated[int, Range(-(2**63), 2**63 - 1), about("Makes a sampled answer repeatable.")] | None = (
        None
    )
    stop: (
        Annotated[
            _String | StopStrings,
            ByType(f"a string of 1 to {_MAX_CHARS} characters or a list of up to {_MAX_STRINGS} of them"),
            about("Strings that end the answer, wherever they are generated, reasoning included."),
        ]
        | None
    ) = None
    stop_token_ids: (
        Annotated[
            list[Annotated[int, Range(0)]],
            Must(f"a list of up to {_MAX_TOKENS} token ids", max_items=_MAX_TOKENS),
            about("Tokens that end the answer."),
        ]
        | None
    ) = None
    include_stop_str_in_output: (
        Annotated[bool, about("Whether the text ends with the stop string.")] | None
    ) = None
    ignore_eos: Annotated[bool, about("Continues after the end-of-sequence token.")] | None = None
    min_tokens: (
        Annotated[int, Range(0), about("Number of tokens before which nothing ends the answer.")] | None
    ) = None
    logit_bias: Annotated[_Biases, about("Added to the logits of tokens, by token id.")] | None = None
    bad_words: (
        Annotated[
            list[_String],
            Must(f"a list of up to {_MAX_TOKENS} strings", max_items=_MAX_TOKENS),
            about("Strings that are never generated."),
        ]
        | None
    ) = None
    prompt_logprobs: (
        Annotated[
            int,
            Range(0, MAX_LOGPROBS),
            about("Returns log-probabilities of the prompt's tokens, and of this many alternatives."),
        ]
        | None
    ) = None
    skip_special_tokens: Annotated[bool, about("Leaves special tokens out of the text.")] | None = None
    spaces_between_special_tokens: (
        Annotated[bool, ignored("byte-level tokenizers add no spaces there.")] | None
    ) = None
    thinking_token_budget: Annotated[int, Range(0), about("Ends thinking after this many tokens.")] | None = (
        None
    )

    def sampling(self) -> dict[str, Any]:
        """Returns the arguments of SamplingParams that the client set."""
        return {name: getattr(self, name) for name in _NAMES if name in self.model_fields_set}


_NAMES = tuple(SamplingBody.model_fields)
