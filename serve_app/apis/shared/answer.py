"""The base class of every API's answer, which serializes choice deltas as server-sent events or as one JSON body.

CONTRIBUTING.md lists the steps that add an API.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qwen3_dist.text.choice import ChoiceDelta
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.apis.shared.prompts import Prompt
from serve_app.apis.shared.resume import Sent

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Returns one server-sent event with `data` as JSON, and an `event:` line if it has a `name`."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%sdata: %s\n\n" % (head, to_json(data))


PING = b": ping\n\n"  # a comment line of server-sent events, which clients ignore


def error_events(error: Exception, sent: bytes = b"") -> bytes:
    """Returns the events that end an OpenAI stream after `error`, whatever was `sent`: the error object, then
    `[DONE]`."""
    return event(error_object(error), "error") + DONE


def last_events(part: bytes, before: bytes) -> bytes:
    """Returns `part` of a stream, or the part `before` it if this one is but a comment."""
    return part if b"data: " in part else before


_SEED_BITS = 62  # room for the indexes of choices


@dataclass(frozen=True)
class Identity:
    """What would differ if one request were answered twice: the `unique` id and the creation time (seconds since the
    epoch) of its answer, and the `seed` of its draws, which a seed of the client's replaces."""

    unique: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    seed: int = field(default_factory=lambda: secrets.randbits(_SEED_BITS))


def seed_of(request_id: str) -> int:
    """A seed that follows from the id of a request."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


@dataclass(frozen=True)
class AnswerContext:
    """What an answer needs beside the deltas.

    `model` is the name that the answer reports. The request has `n` choices for each of `prompts`. `tokenizer` is
    None for a checkpoint without one. `request_id` is the id of the HTTP request; empty if there is none.
    `weights_version` tells the version of the weights of now; "" for the model's own.
    """

    model: str
    tokenizer: Tokenizer | None
    prompts: list[Prompt]
    n: int = 1
    request_id: str = ""
    identity: Identity = field(default_factory=Identity)
    weights_version: Callable[[], str] = str


LEFT = b"left"  # the body of a 503 of a replica that was told to leave: the request is not to blame
DIED = b"died"  # the body of a 503 of a replica that ends because its engine died


class Running(NamedTuple):
    """The first item of an answer: the replica of that id has the request. It comes again when that changes: if the
    request only `waits`, so that the replica's end is not its doing, and before the first step that holds it."""

    replica: str
    waits: bool = False


class Counted(NamedTuple):
    """An item of an answer on its way from the replica to the ingress, with the number of tokens of all prompts and
    choices so far, and how many of them are those of the prompts, and are prompt tokens found in the prefix cache.

    `sent` has what a part adds to what there is of the answer (see `Resume`), `model` what the replica has made it
    with.
    """

    item: Any
    tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sent: Sent = ()
    model: str = ""


@dataclass
class Usage:
    """Token counts of a request so far.

    `prompt` counts each prompt once, however many choices it has; `completion` sums over all choices. `cached` is the
    number of prompt tokens found in the prefix cache, `reasoning` the number of completion tokens that are reasoning.
    """

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    _started: set[int] = field(default_factory=set)

    def count(self, delta: ChoiceDelta, n: int) -> None:
        """Adds `delta`, where each prompt has `n` choices. A prompt's cached tokens are in its first delta."""
        self.completion += len(delta.token_ids)
        self.reasoning += delta.num_reasoning_tokens
        if delta.index // n not in self._started:
            self._started.add(delta.index // n)
            self.cached += delta.num_cached_tokens

    @property
    def total(self) -> int:
        """The tokens of all prompts and choices."""
        return self.prompt + self.completion

    def to_json(self) -> Json:
        """Returns OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.total,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Answer(ABC):
    """Serializes the answer to one request.

    The caller passes every delta to `count` first. A stream is `begin()`, then `delta(d)` for each delta, then
    `end()`, or `fail(error)` if generation fails after the stream began. `full_response` serializes an answer that
    is not streamed. `repeats_logprobs`: the last events have the log-probabilities of all tokens again.
    """

    repeats_logprobs = False

    def __init__(self, context: AnswerContext) -> None:
        self.context = context
        self.usage = Usage(sum(len(prompt.token_ids) for prompt in context.prompts))
        self.unique = context.identity.unique

    def count(self, delta: ChoiceDelta) -> None:
        """Adds the tokens of `delta` to `usage`."""
        self.usage.count(delta, self.context.n)

    def begin(self) -> bytes:
        """Returns the events that precede the deltas of the first step."""
        return b""

    @abstractmethod
    def delta(self, delta: ChoiceDelta) -> bytes:
        """Returns the events for `delta`, b"" if it adds nothing to the stream."""

    def end(self) -> bytes:
        """Returns the events after the last delta, including the API's end marker."""
        return DONE

    def fail(self, error: Exception) -> bytes:
        """Returns the events that end a stream after `error`."""
        return error_events(error)

    @abstractmethod
    def full_response(self, choices: Sequence[ChoiceDelta]) -> Json:
        """Returns the JSON body for `choices`, the deltas of each merged by `text.choice.join`."""
