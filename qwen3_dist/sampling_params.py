"""What a caller may ask of one generation; validated once, at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen3_dist.errors import RequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping rules of one request (names and meanings as in vLLM and OpenAI).

    `temperature=0` is greedy. `top_k=0` or `-1` and `top_p=1` keep every token. `max_tokens=None`
    generates up to the context length. `logprobs=K` returns the chosen token's log-probability and
    the K likeliest (0 <= K <= 20), taken from the raw logits before temperature and filters.
    A `seed` makes each token depend on (seed, position) alone.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _check(_is_int(self.n) and 1 <= self.n <= 128, "n", "an integer from 1 to 128", self.n)
        _check(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            "an integer of at least 1",
            self.max_tokens,
        )
        _check(_in(self.temperature, 0.0, 2.0), "temperature", "a number from 0 to 2", self.temperature)
        _check(
            _in(self.top_p, 0.0, 1.0) and self.top_p > 0,
            "top_p",
            "a number above 0 and at most 1",
            self.top_p,
        )
        _check(_is_int(self.top_k) and self.top_k >= -1, "top_k", "an integer of at least -1", self.top_k)
        _check(
            self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63),
            "seed",
            "a 64-bit integer",
            self.seed,
        )
        _check(
            len(stop) <= 16 and all(isinstance(s, str) and s for s in stop),
            "stop",
            "a non-empty string or a list of up to 16 of them",
            self.stop,
        )
        _check(
            all(_is_int(t) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids",
            "a list of token ids",
            self.stop_token_ids,
        )
        _check(
            self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            "logprobs",
            f"an integer from 0 to {MAX_LOGPROBS}",
            self.logprobs,
        )


def _check(ok: bool, param: str, expected: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{param} must be {expected}, not {value!r}", param=param)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in(value: object, low: float, high: float) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )
