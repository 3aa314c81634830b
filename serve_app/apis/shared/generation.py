"""What chat and text completions share: their fields, and the way from a request to prompts and an answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import Reading
from serve_app.apis.shared.answer import Answer, Served, error_events
from serve_app.apis.shared.body import (
    Body,
    Json,
    ModelName,
    Priority,
    Range,
    User,
    about,
    short,
    without_nulls,
)
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.openai import Shown
from serve_app.apis.shared.prompts import Prompt, Texts
from serve_app.apis.shared.sampling import SamplingBody
from serve_app.apis.shared.structure import StructureBody, structured_outputs


class _StreamOptions(Body):
    include_usage: Annotated[bool, about("A last chunk has the token counts.")] = False
    continuous_usage_stats: Annotated[
        bool, about("With include_usage: every chunk has the counts so far.")
    ] = False


_NO_OPTIONS = _StreamOptions()


class GenerationBody(SamplingBody, StructureBody):
    """The fields that both bodies have."""

    model: ModelName = ""
    stream: Annotated[bool, about("Answers with server-sent events.")] = False
    stream_options: Annotated[_StreamOptions, about("Of a stream alone.")] | None = None
    best_of: Annotated[int, Range(1), about("As many as n.")] | None = None
    priority: Priority = 0
    user: User = ""
    return_token_ids: Annotated[bool, about("Gives token ids beside the text.")] = False
    return_tokens_as_token_ids: Annotated[
        bool, about("Names the tokens of log-probabilities token_id:N.")
    ] = False


# Fields that would change the answer and are not built: the values that ask for nothing, and advice.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "use tools"),
    "function_call": (("auto", "none"), "use tool_choice"),
    "suffix": (("",), "leave it out"),
    "modalities": ((["text"],), "the model answers with text alone"),
    "audio": ((), "the model answers with text alone"),
    "chat_template": ((), "the model's own is used; chat_template_kwargs reach it"),
    "use_beam_search": ((False,), "leave it out"),
    "allowed_token_ids": (([],), "use structured_outputs or logit_bias"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "prompt_embeds": (([],), "send text or token ids"),
    "logits_processors": (([],), "leave it out"),
}


@dataclass(frozen=True)
class GenerationRequest(ABC):
    """What generating endpoints share.

    `model` is "" where the client named none. `sampling` holds the SamplingParams fields that the client set,
    `names` those that it calls otherwise.
    """

    model: str
    sampling: Json
    names: Mapping[str, str]
    stream: bool
    shown: Shown
    priority: int

    @abstractmethod
    def prompts(self, texts: Texts) -> list[Prompt]:
        """Each prompt. Raises RequestError where the checkpoint lacks what that takes, or for too long a text."""

    @property
    def num_sequences(self) -> int:
        """Choices of all prompts."""
        return self.sampling.get("n", 1) * self.num_prompts

    @property
    def num_prompts(self) -> int:
        return 1

    @abstractmethod
    def answer(self, served: Served) -> Answer:
        """The form in which this request is answered."""

    def reading(self, texts: Texts, prompt: Prompt) -> Reading:
        """How what follows `prompt` is to be read: as plain text, unless the API knows more."""
        return Reading()

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters; `defaults` (the checkpoint's) apply where the client set nothing."""
        return SamplingParams(**{**defaults, **self.sampling})

    def renamed(self, error: RequestError) -> RequestError:
        """`error` in the client's words."""
        return _renamed(error, self.names)

    def error_body(self, error: Exception) -> dict[str, Any]:
        """What says that this request failed."""
        return error_object(error)

    def error_events(self, error: Exception) -> bytes:
        """What ends a stream whose replica was lost."""
        return error_events(error)


def read_generation(body: GenerationBody, limit: str, logprobs: tuple[str, int | None]) -> Json:
    """Constructor arguments of a GenerationRequest. Raises RequestError.

    `limit` is the field that holds the most tokens, `logprobs` the one for log-probabilities and how many it asks.
    """
    _refuse_unbuilt(body)
    sampling = body.sampling()
    names = {"max_tokens": limit, "logprobs": logprobs[0]}
    most = {"max_tokens": getattr(body, limit), "logprobs": logprobs[1]}
    sampling |= without_nulls(most)
    if structure := structured_outputs(body):
        names["structured_outputs"], sampling["structured_outputs"] = structure
    try:
        SamplingParams(**{"max_tokens": None, **sampling})
    except RequestError as error:
        raise _renamed(error, names) from None
    return {
        "model": body.model,
        "sampling": sampling,
        "names": names,
        "stream": body.stream,
        "shown": _shown(body, logprobs[1] is not None),
        "priority": body.priority,
    }


def _refuse_unbuilt(body: GenerationBody) -> None:
    given = body.undeclared
    for name in _REFUSED if given else ():
        neutral, advice = _REFUSED[name]
        if name in given and given[name] not in neutral:
            raise RequestError(f"{name}={short(given[name])} is not supported; {advice}", param=name)
    n = body.n or 1
    if body.best_of not in (None, n):
        raise RequestError(f"best_of must be n={n}: choices are not ranked here", param="best_of")
    if body.stream_options and not body.stream:
        raise RequestError("stream_options need stream to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs do not come in a stream", param="prompt_logprobs")


def _shown(body: GenerationBody, logprobs: bool) -> Shown:
    options = body.stream_options or _NO_OPTIONS
    return Shown(
        usage=options.include_usage,
        usage_so_far=options.include_usage and options.continuous_usage_stats,
        token_ids=body.return_token_ids,
        tokens_as_ids=body.return_tokens_as_token_ids,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
    )


def _renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    param = error.param or ""
    field = re.split(r"[.\[]", param, maxsplit=1)[0]
    if names.get(field, field) == field:
        return error
    return error.blaming(names[field], str(error).replace(param, names[field], 1))
