"""What chat and text completions share: their fields, and the way from a request to prompts and an answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import Reading
from serve_app.apis.shared.answer import Answer, Served, error_events
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.kinds import BOOL, TEXT, Field, Json, Record, integer, short
from serve_app.apis.shared.openai import Shown
from serve_app.apis.shared.prompts import Prompt, Texts
from serve_app.apis.shared.sampling import SAMPLING
from serve_app.apis.shared.structure import STRUCTURE, structured_outputs

_OPTIONS = Record(
    "an object",
    {
        "include_usage": Field(BOOL, "A last chunk has the token counts."),
        "continuous_usage_stats": Field(BOOL, "With include_usage: every chunk has the counts so far."),
    },
)
GENERATION: dict[str, Field] = {
    "model": Field(TEXT, "The served model's name, or an adapter's; absent, it is the model."),
    **SAMPLING,
    "stream": Field(BOOL, "Answers with server-sent events."),
    "stream_options": Field(_OPTIONS, "Of a stream alone."),
    **STRUCTURE,
    "best_of": Field(integer(1), "As many as n."),
    "priority": Field(integer(-(2**31), 2**31 - 1), "A lower one goes first."),
    "user": Field(TEXT, ignored="nobody here looks for abuse by single users."),
    "return_token_ids": Field(BOOL, "Gives token ids beside the text."),
    "return_tokens_as_token_ids": Field(BOOL, "Names the tokens of log-probabilities token_id:N."),
}
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


def read_generation(given: Json, limit: str, logprobs: tuple[str, int | None]) -> Json:
    """Constructor arguments of a GenerationRequest. Raises RequestError.

    `limit` is the field that holds the most tokens, `logprobs` the one for log-probabilities and how many it asks.
    """
    _refuse_unbuilt(given)
    sampling = {name: given[name] for name in SAMPLING if name in given}
    names = {"max_tokens": limit, "logprobs": logprobs[0]}
    if limit in given:
        sampling["max_tokens"] = given[limit]
    if logprobs[1] is not None:
        sampling["logprobs"] = logprobs[1]
    if structure := structured_outputs(given):
        names["structured_outputs"], sampling["structured_outputs"] = structure
    try:
        SamplingParams(**{"max_tokens": None, **sampling})
    except RequestError as error:
        raise _renamed(error, names) from None
    return {
        "model": given.get("model", ""),
        "sampling": sampling,
        "names": names,
        "stream": given.get("stream", False),
        "shown": _shown(given, logprobs[1] is not None),
        "priority": given.get("priority", 0),
    }


def _refuse_unbuilt(given: Json) -> None:
    for name, (neutral, advice) in _REFUSED.items():
        if name in given and given[name] not in neutral:
            raise RequestError(f"{name}={short(given[name])} is not supported; {advice}", param=name)
    n = given.get("n", 1)
    if given.get("best_of", n) != n:
        raise RequestError(f"best_of must be n={n}: choices are not ranked here", param="best_of")
    if "stream_options" in given and not given.get("stream"):
        raise RequestError("stream_options need stream to be true", param="stream_options")
    if given.get("stream") and "prompt_logprobs" in given:
        raise RequestError("prompt_logprobs do not come in a stream", param="prompt_logprobs")


def _shown(given: Json, logprobs: bool) -> Shown:
    options = given.get("stream_options", {})
    usage = options.get("include_usage", False)
    return Shown(
        usage=usage,
        usage_so_far=usage and options.get("continuous_usage_stats", False),
        token_ids=given.get("return_token_ids", False),
        tokens_as_ids=given.get("return_tokens_as_token_ids", False),
        logprobs=logprobs,
        prompt_logprobs="prompt_logprobs" in given,
    )


def _renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    param = error.param or ""
    field = re.split(r"[.\[]", param, maxsplit=1)[0]
    if names.get(field, field) == field:
        return error
    return error.blaming(names[field], str(error).replace(param, names[field], 1))
