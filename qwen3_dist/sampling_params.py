"""Sampling parameters of a request, validated at construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import RequestError

MAX_LOGPROBS = 20
REASONING = ("none", "optional", "open")
_MOST_INT = 2**31 - 1
_MOST_STRINGS, _MOST_TOKENS = 16, 1024  # stop strings; stop tokens, biased tokens, bad words


@dataclass(frozen=True)
class StructuredOutputs:
    """Constraints on the generated text; exactly one field is set (names and meanings as in vLLM).

    `json` is a JSON schema, `json_object` any JSON object, `regex` a regular expression that the whole text
    matches, `choice` one of several texts, `grammar` a context-free grammar (Lark or GBNF).
    """

    json: Mapping[str, Any] | bool | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False)]
        if self.json is False:
            given.append("json")
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs needs exactly one of json, json_object, regex, choice, grammar, not {given}",
                param="structured_outputs",
            )

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema, if there is one and it is an object; else None."""
        return (
            {"type": "object"} if self.json_object else self.json if isinstance(self.json, Mapping) else None
        )


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping rules of one request (names and meanings as in vLLM and OpenAI).

    `temperature=0` is greedy. `top_k=0` or `-1`, `top_p=1` and `min_p=0` keep every token. `max_tokens=None`
    generates up to the context length, 0 nothing, for the sake of `prompt_logprobs`; before `min_tokens`
    neither EOS nor a stop token or string ends it.
    `logprobs=K` returns the chosen token's log-probability and the K likeliest (0 <= K <= 20), taken from
    the raw logits before penalties, temperature and filters; `prompt_logprobs=K` those of the prompt's
    tokens; `logprob_token_ids` adds those of given tokens. A `seed` makes each token depend on
    (seed, position) alone. `logit_bias` is token id to number, `bad_words` are texts that must not come.

    `reasoning` says where thinking stands when generation starts: "open" (the prompt ends inside <think>),
    "optional" (the model may open it) or "none". `thinking_token_budget` ends thinking after so many tokens,
    and `structured_outputs` hold for what follows thinking.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    reasoning: str = "none"
    thinking_token_budget: int | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._normalise()
        integer, number = "an integer from {} to {}", "a number from {} to {}"
        self._check("n", _is_int(self.n, 1, 128), integer.format(1, 128))
        self._check(
            "max_tokens", self.max_tokens is None or _is_int(self.max_tokens, 0), "an integer of at least 0"
        )
        self._check("temperature", _is_number(self.temperature, 0, 2), number.format(0, 2))
        above_0 = "a number above 0 and at most {}"
        self._check("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, above_0.format(1))
        self._check("top_k", _is_int(self.top_k, -1), "an integer of at least -1")
        self._check("min_p", _is_number(self.min_p, 0, 1), number.format(0, 1))
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, _is_number(getattr(self, name), -2, 2), number.format(-2, 2))
        penalty = self.repetition_penalty
        self._check("repetition_penalty", _is_number(penalty, 0, 10) and penalty > 0, above_0.format(10))
        self._check("seed", self.seed is None or _is_int(self.seed, -(2**63), 2**63 - 1), "a 64-bit integer")
        texts = f"a non-empty string or a list of up to {_MOST_STRINGS} of them"
        self._check("stop", _are_texts(self.stop, _MOST_STRINGS), texts)
        self._check("bad_words", _are_texts(self.bad_words, _MOST_TOKENS), "a list of non-empty strings")
        for name in ("stop_token_ids", "logprob_token_ids"):
            self._check(
                name, _are_token_ids(getattr(self, name)), f"a list of up to {_MOST_TOKENS} token ids"
            )
        self._check("min_tokens", _is_int(self.min_tokens, 0), "an integer of at least 0")
        too_long = self.max_tokens is not None and self.min_tokens > self.max_tokens
        self._check("min_tokens", not too_long, f"at most max_tokens={self.max_tokens}")
        bias = "an object of up to 1024 token ids with numbers from -100 to 100"
        self._check("logit_bias", _is_bias(self.logit_bias), bias)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(
                name, value is None or _is_int(value, 0, MAX_LOGPROBS), integer.format(0, MAX_LOGPROBS)
            )
        for name in (
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        budget = self.thinking_token_budget
        self._check("thinking_token_budget", budget is None or _is_int(budget, 0), "an integer of at least 0")
        self._check("reasoning", self.reasoning in REASONING, f"one of {', '.join(REASONING)}")

    @property
    def is_plain(self) -> bool:
        """Whether temperature, top-p and top-k are all that a draw asks of its logits, whatever came before."""
        asked = (self.min_p, self.presence_penalty, self.frequency_penalty, self.repetition_penalty != 1)
        listed = (self.min_tokens, self.logit_bias, self.bad_words, self.logprob_token_ids)
        formed = self.thinking_token_budget is not None or self.structured_outputs is not None
        return not (any(asked) or any(listed) or formed)

    def _normalise(self) -> None:
        """Lists to tuples, a lone stop string to a tuple of it, a bias by token id to pairs, numbers larger than any
        count of tokens to the largest."""
        set_ = object.__setattr__
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            set_(self, name, (value,) if isinstance(value, str) else _as_tuple(value))
        for name in ("stop_token_ids", "logprob_token_ids"):
            set_(self, name, _as_tuple(getattr(self, name)))
        for name in ("top_k", "min_tokens", "thinking_token_budget"):  # ranks keep them in 32 bits
            value = getattr(self, name)
            if _is_int(value, _MOST_INT):
                set_(self, name, _MOST_INT)
        bias = self.logit_bias
        if isinstance(bias, Mapping):
            bias = tuple((_as_int(token), value) for token, value in bias.items())
        set_(self, "logit_bias", _as_tuple(bias))

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} must be {expected}, not {getattr(self, name)!r}", param=name)


def _as_tuple(value: Any) -> Any:
    return tuple(value or ()) if isinstance(value, list | tuple | None) else value


def _as_int(text: Any) -> Any:
    """JSON's keys are text."""
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 10 else text


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _are_texts(value: object, most: int) -> bool:
    return isinstance(value, tuple) and len(value) <= most and all(isinstance(s, str) and s for s in value)


def _are_token_ids(value: object) -> bool:
    return (
        isinstance(value, tuple) and len(value) <= _MOST_TOKENS and all(_is_int(token, 0) for token in value)
    )


def _is_bias(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= _MOST_TOKENS
        and all(len(pair) == 2 and _is_int(pair[0], 0) and _is_number(pair[1], -100, 100) for pair in value)
    )
