"""Requests of a simulation with random lengths: Poisson arrivals, or a closed loop. `trace` reads recorded ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Request:
    """A request that arrives at `arrival_s` with `input_len` prompt tokens and generates `output_len` tokens.

    Requests with the same `prefix_id` share their first `prefix_len` prompt tokens.
    """

    arrival_s: float
    input_len: int
    output_len: int
    prefix_id: int = 0
    prefix_len: int = 0


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens: fixed if `cv` is 0, else lognormal with coefficient of variation `cv`."""

    mean: float
    cv: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1):
            raise ConfigError(f"a length must be at least 1 token, not {self.mean:g}")
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise ConfigError(
                f"the coefficient of variation of a length must not be negative, not {self.cv:g}"
            )
        if self.cv == 0 and self.mean != int(self.mean):
            raise ConfigError(f"a fixed length must be a whole number of tokens, not {self.mean:g}")

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Parses `512` (fixed) or `512:0.8` (lognormal with mean 512 and cv 0.8). Raises ConfigError."""
        mean, colon, cv = text.partition(":")
        try:
            return cls(float(mean), float(cv) if colon else 0.0)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"length {text!r} must be N or MEAN:CV, such as 512 or 512:0.8") from None

    def draw(self, rng: random.Random) -> int:
        """Draws a length of at least 1."""
        if self.cv == 0:
            return int(self.mean)
        variance = math.log1p(self.cv**2)  # of the logarithm; E[exp N(mu, v)] = exp(mu + v / 2)
        value = rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return max(1, round(value))


@dataclass(frozen=True)
class PoissonArrivals:
    """Poisson arrivals for `duration_s` seconds, split evenly among `rates` (requests per second), one after the
    other.

    With `num_prefixes` > 0 each prompt begins with one of `num_prefixes` equally likely prefixes of `prefix_len`
    tokens, cut to the length of the prompt.
    """

    rates: tuple[float, ...]
    duration_s: float
    input_len: Lengths
    output_len: Lengths
    prefix_len: int = 0
    num_prefixes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rates or not all(math.isfinite(rate) and rate >= 0 for rate in self.rates):
            raise ConfigError(f"the arrival rate must not be negative, not {self.rates}")
        if not any(self.rates):
            raise ConfigError("the arrival rate is 0, so there are no requests; give a rate above 0")
        if not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise ConfigError(f"the duration must be above 0 seconds, not {self.duration_s:g}")
        if self.prefix_len < 0 or self.num_prefixes < 0:
            raise ConfigError("the prefix length and the number of prefixes must not be negative")
        if (self.prefix_len > 0) != (self.num_prefixes > 0):
            raise ConfigError("shared prefixes need both a length and a number of prefixes above 0")
        if self.prefix_len >= self.input_len.mean and self.num_prefixes:
            raise ConfigError(
                f"the prefix of {self.prefix_len} tokens is not shorter than the mean prompt of "
                f"{self.input_len.mean:g}, which includes it; make the prompt longer"
            )

    def __iter__(self) -> Iterator[Request]:
        rng = random.Random(self.seed)
        part_s = self.duration_s / len(self.rates)
        for part, rate in enumerate(self.rates):
            now, end = part * part_s, (part + 1) * part_s
            while rate and (now := now + rng.expovariate(rate)) < end:
                input_len, output_len = self.input_len.draw(rng), self.output_len.draw(rng)
                prefix = rng.randrange(self.num_prefixes) if self.num_prefixes else 0
                yield Request(now, input_len, output_len, prefix, min(self.prefix_len, input_len))


class ClosedLoop:
    """`clients` clients that begin together. Each sends its next request when its last is answered, until
    `num_requests` were sent in all."""

    def __init__(
        self, clients: int, num_requests: int, input_len: Lengths, output_len: Lengths, seed: int = 0
    ) -> None:
        if clients < 1 or num_requests < clients:
            raise ConfigError(
                f"a closed loop needs at least one client and a request for each, not {clients} clients and "
                f"{num_requests} requests"
            )
        self._clients, self._left = clients, num_requests
        self._lengths = input_len, output_len
        self._rng = random.Random(seed)

    def __iter__(self) -> Iterator[Request]:
        """The clients' first requests."""
        for _ in range(self._clients):
            yield from self.after(0.0, 1)

    def after(self, now_s: float, answered: int) -> Iterator[Request]:
        """The next requests of the clients of `answered` requests that ended at `now_s`."""
        for _ in range(min(answered, self._left)):
            self._left -= 1
            input_len, output_len = (lengths.draw(self._rng) for lengths in self._lengths)
            yield Request(now_s, input_len, output_len)
