"""What every API's answer is: a request's choice deltas as a stream of events, or joined into one body.

A new API is two things. A module of its own in `apis` with the model of its body (`Body`), a subclass of
GenerationRequest (mostly of ChatRequest, whose fields `chat_fields` reads from a body translated to chat's words), a
function from bytes to it, and a subclass of Answer, which the request's `answer` returns. And a route in
`ingress.deployment`, with its errors in `error_forms` where they are not OpenAI's object.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.text.choice import ChoiceDelta
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.apis.shared.prompts import Prompt

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event, `name`d or not."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%sdata: %s\n\n" % (head, to_json(data))


def error_events(error: Exception) -> bytes:
    """OpenAI's end of a stream on which something broke: the client library raises, others see the end."""
    return event(error_object(error), "error") + DONE


@dataclass(frozen=True)
class Served:
    """What an answer says of the service, and needs of the request: its prompts, with `n` choices each."""

    model: str
    tokenizer: Tokenizer | None
    prompts: list[Prompt]
    n: int = 1


@dataclass
class Usage:
    """Token counts of a request so far: prompts once each, tokens of all choices.

    `cached` of the prompt tokens came from the prefix cache, `reasoning` of the completion tokens were thought.
    """

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    _started: set[int] = field(default_factory=set)

    def count(self, delta: ChoiceDelta, n: int) -> None:
        """Takes in a delta of one of `n` choices per prompt; the first of a prompt says what was cached."""
        self.completion += len(delta.token_ids)
        self.reasoning += delta.num_reasoning_tokens
        if delta.index // n not in self._started:
            self._started.add(delta.index // n)
            self.cached += delta.num_cached_tokens

    def to_json(self) -> Json:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Answer(ABC):
    """The answer to one request. Each delta is counted (`count`) before it is shown.

    A stream is `begin()`, `delta(d)` for each delta (both before anything is known of the next step), then
    `end()`, or `fail(error)` where something broke after the stream began. `whole` is the unstreamed answer.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self.usage = Usage(sum(len(prompt.token_ids) for prompt in served.prompts))
        self.unique = uuid.uuid4().hex

    def count(self, delta: ChoiceDelta) -> None:
        self.usage.count(delta, self.served.n)

    def begin(self) -> bytes:
        """Events that go out with the first step, before its deltas."""
        return b""

    @abstractmethod
    def delta(self, delta: ChoiceDelta) -> bytes:
        """Events for `delta`; b"" where it shows nothing."""

    def end(self) -> bytes:
        """Events after the last delta, the API's end marker included."""
        return DONE

    def fail(self, error: Exception) -> bytes:
        """Events that end a stream on which something broke."""
        return error_events(error)

    @abstractmethod
    def whole(self, choices: Sequence[ChoiceDelta]) -> Json:
        """The whole answer, of choices that were joined (`choices.join`)."""
