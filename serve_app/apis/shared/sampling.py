"""The fields of a body that say how tokens are drawn and when they end."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from qwen3_dist.sampling_params import MAX_LOGPROBS
from serve_app.apis.shared.body import Body, ByType, Must, Range, about, ignored

_MOST_STRINGS, _MOST_CHARS, _MOST_TOKENS = 16, 1000, 1024
_String = Annotated[
    str,
    Field(min_length=1, max_length=_MOST_CHARS),
    Must(f"a string of 1 to {_MOST_CHARS} characters"),
]
StopStrings = Annotated[
    list[_String],
    Must(f"a list of up to {_MOST_STRINGS} strings of 1 to {_MOST_CHARS} characters", most=_MOST_STRINGS),
]
_Bias = Annotated[float, Range(-100, 100)]
_Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], _Bias],
    Field(max_length=_MOST_TOKENS),
    Must(f"an object of up to {_MOST_TOKENS} token ids with numbers from -100 to 100"),
    Field(json_schema_extra={"additionalProperties": False}),
]
Temperature = Annotated[float, Range(0, 2), about("0 always takes the likeliest token.")]
TopP = Annotated[
    float,
    Range(0, 1, above=True),
    about("Keeps the likeliest tokens that have this probability together."),
]


class SamplingBody(Body):
    """Names as SamplingParams has them; what is absent is as the checkpoint recommends."""

    n: Annotated[int, Range(1, 128), about("Choices per prompt.")] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: (
        Annotated[int, Range(-1), about("Keeps so many of the likeliest tokens; 0 and -1 keep all.")] | None
    ) = None
    min_p: (
        Annotated[
            float,
            Range(0, 1),
            about("Keeps tokens at least this probable, relative to the likeliest."),
        ]
        | None
    ) = None
    presence_penalty: (
        Annotated[float, Range(-2, 2), about("Taken off the logits of tokens that came already.")] | None
    ) = None
    frequency_penalty: (
        Annotated[float, Range(-2, 2), about("Taken off a token's logit for each time it came.")] | None
    ) = None
    repetition_penalty: (
        Annotated[
            float,
            Range(0, 10, above=True),
            about("Divides the positive logits of tokens in prompt and output."),
        ]
        | None
    ) = None
    seed: Annotated[int, Range(-(2**63), 2**63 - 1), about("Makes a sampled answer repeatable.")] | None = (
        None
    )
    stop: (
        Annotated[
            _String | StopStrings,
            ByType(f"a string of 1 to {_MOST_CHARS} characters or a list of up to {_MOST_STRINGS} of them"),
            about(
                "Texts that end the answer; they are looked for in all that is generated, reasoning included."
            ),
        ]
        | None
    ) = None
    stop_token_ids: (
        Annotated[
            list[Annotated[int, Range(0)]],
            Must(f"a list of up to {_MOST_TOKENS} token ids", most=_MOST_TOKENS),
            about("Tokens that end the answer."),
        ]
        | None
    ) = None
    include_stop_str_in_output: Annotated[bool, about("Whether the stop string is shown.")] | None = None
    ignore_eos: Annotated[bool, about("Goes on after the end-of-sequence token.")] | None = None
    min_tokens: Annotated[int, Range(0), about("Nothing ends the answer before so many tokens.")] | None = (
        None
    )
    logit_bias: Annotated[_Biases, about("Added to the logits of tokens, by token id.")] | None = None
    bad_words: (
        Annotated[
            list[_String],
            Must(f"a list of up to {_MOST_TOKENS} strings", most=_MOST_TOKENS),
            about("Texts that are never generated."),
        ]
        | None
    ) = None
    prompt_logprobs: (
        Annotated[int, Range(0, MAX_LOGPROBS), about("Log-probabilities of the prompt's tokens.")] | None
    ) = None
    skip_special_tokens: Annotated[bool, about("Leaves special tokens out of the text.")] | None = None
    spaces_between_special_tokens: (
        Annotated[bool, ignored("byte-level tokenizers put no spaces there.")] | None
    ) = None
    thinking_token_budget: Annotated[int, Range(0), about("Ends thinking after so many tokens.")] | None = (
        None
    )

    def sampling(self) -> dict[str, Any]:
        """Arguments of SamplingParams: the fields that the client set."""
        return {name: getattr(self, name) for name in _NAMES if name in self.model_fields_set}


_NAMES = tuple(SamplingBody.model_fields)
