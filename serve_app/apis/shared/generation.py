"""What all requests that generate text share: the fields of their bodies, and the base class of the requests."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from qwen3_dist.errors import RequestError
from qwen3_dist.request_terms import RequestTerms
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import ParserSpec
from serve_app.apis.shared.answer import PING, Answer, AnswerContext, Identity, error_events, seed_of
from serve_app.apis.shared.body import (
    Body,
    Json,
    ModelName,
    Range,
    User,
    about,
    without_nulls,
)
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.openai import AnswerOptions
from serve_app.apis.shared.prompts import Prompt, PromptRenderer
from serve_app.apis.shared.sampling import SamplingBody
from serve_app.apis.shared.structure import StructureBody, structured_outputs
from serve_app.apis.shared.terms import TermsBody
from serve_app.apis.shared.validation_errors import short


class _StreamOptions(Body):
    include_usage: Annotated[bool, about("Sends the token counts in a last chunk.")] = False
    continuous_usage_stats: Annotated[
        bool, about("With include_usage: sends the token counts so far in every chunk.")
    ] = False


_NO_OPTIONS = _StreamOptions()


class GenerationBody(SamplingBody, StructureBody, TermsBody):
    """The fields that bodies of chat and text completions share."""

    model: ModelName = ""
    stream: Annotated[bool, about("Answers with server-sent events.")] = False
    stream_options: Annotated[_StreamOptions, about("Options of a stream; requires stream.")] | None = None
    best_of: Annotated[int, Range(1), about("Must equal n, since choices are not ranked.")] | None = None
    user: User = ""
    return_token_ids: Annotated[bool, about("Adds token ids to each choice.")] = False
    return_tokens_as_token_ids: Annotated[
        bool, about("Names tokens in log-probabilities token_id:N instead of by their text.")
    ] = False


# Unsupported fields that would change the answer: the values that are accepted since they request nothing, and what to
# do instead.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "use tools"),
    "function_call": (("auto", "none"), "use tool_choice"),
    "suffix": (("",), "leave it out"),
    "modalities": ((["text"],), "the model answers with text only"),
    "audio": ((), "the model answers with text only"),
    "chat_template": ((), "the checkpoint's template is used; pass variables to it in chat_template_kwargs"),
    "use_beam_search": ((False,), "leave it out"),
    "allowed_token_ids": (([],), "use structured_outputs or logit_bias"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "prompt_embeds": (([],), "send text or token ids"),
    "logits_processors": (([],), "leave it out"),
}


@dataclass(frozen=True)
class GenerationRequest(ABC):
    """A parsed request that generates text.

    `model` is "" if the client named none. `sampling` holds the SamplingParams fields that the client set.
    `client_names` maps a SamplingParams field to the body's field, where their names differ. `identity` is None until
    `with_identity` fixes it.
    """

    model: str
    sampling: Json
    client_names: Mapping[str, str]
    stream: bool
    options: AnswerOptions
    terms: RequestTerms
    identity: Identity | None = None

    @abstractmethod
    def prompts(self, renderer: PromptRenderer) -> list[Prompt]:
        """Returns the tokenized prompts.

        Raises RequestError if the checkpoint lacks a tokenizer or a template that they need, or for a text that is
        too long.
        """

    @abstractmethod
    def prompt_bytes(self) -> bytes:
        """Returns bytes that begin alike for requests whose prompts begin alike and may share cached prefixes."""

    @property
    def num_sequences(self) -> int:
        """The number of choices over all prompts."""
        return self.sampling.get("n", 1) * self.num_prompts

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar may have to be compiled, which may take long."""
        return "structured_outputs" in self.sampling

    @property
    def num_prompts(self) -> int:
        return 1

    @abstractmethod
    def answer(self, context: AnswerContext) -> Answer:
        """Returns the serializer of this request's answer."""

    def parser_spec(self, renderer: PromptRenderer, prompt: Prompt) -> ParserSpec:
        """Returns how to parse the text generated after `prompt`; by default it is all content."""
        return ParserSpec()

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Returns the sampling parameters; `defaults`, the checkpoint's, fill in what the client did not set."""
        return SamplingParams(**{**defaults, **self.sampling})

    def with_client_names(self, error: RequestError) -> RequestError:
        """Returns `error` with the SamplingParams field in `param` and message replaced by the body's field."""
        return _with_client_names(error, self.client_names)

    def error_body(self, error: Exception) -> dict[str, Any]:
        """Returns the JSON body for `error` in the format of this request's API."""
        return error_object(error)

    @property
    def ping(self) -> bytes:
        """What keeps a stream's connection alive while its prompt waits or is read."""
        return PING

    def error_events(self, error: Exception, sent: bytes) -> bytes:
        """Returns the events that end the stream of a request whose replica died, after the events `sent` last."""
        return error_events(error)


Request = TypeVar("Request", bound=GenerationRequest)


def with_identity(request: Request, request_id: str = "") -> Request:
    """Returns `request` with its identity fixed: answered twice, by whichever replica, its answers have the same id,
    creation time and draws.

    The seed of the draws follows from `request_id`, so that a client that sends a request again with the same
    `X-Request-Id`, after a proxy was lost, gets the same text.
    """
    if request.identity:
        return request
    return replace(request, identity=Identity(seed=seed_of(request_id)) if request_id else Identity())


def generation_fields(
    body: GenerationBody, max_tokens_field: str, logprobs_field: str, num_logprobs: int | None
) -> Json:
    """Returns the constructor arguments of a GenerationRequest. Raises RequestError.

    `max_tokens_field` and `logprobs_field` name the fields of `body` that set `max_tokens` and `logprobs`.
    `num_logprobs` is None if the client asked for no log-probabilities.
    """
    _check_supported(body)
    sampling = body.sampling()
    names = {"max_tokens": max_tokens_field, "logprobs": logprobs_field}
    sampling |= without_nulls({"max_tokens": getattr(body, max_tokens_field), "logprobs": num_logprobs})
    if structure := structured_outputs(body):
        names["structured_outputs"], sampling["structured_outputs"] = structure
    try:
        SamplingParams(**{"max_tokens": None, **sampling})
    except RequestError as error:
        raise _with_client_names(error, names) from None
    return {
        "model": body.model,
        "sampling": sampling,
        "client_names": names,
        "stream": body.stream,
        "options": _answer_options(body, num_logprobs is not None),
        "terms": body.terms,
    }


def _check_supported(body: GenerationBody) -> None:
    """Raises RequestError for a field, or a combination of fields, that is not supported."""
    given = body.undeclared
    for name, (neutral, advice) in _UNSUPPORTED.items() if given else ():
        if name in given and given[name] not in neutral:
            raise RequestError(f"{name}={short(given[name])} is not supported; {advice}", param=name)
    n = body.n or 1
    if body.best_of not in (None, n):
        raise RequestError(
            f"best_of must equal n={n}, since choices are not ranked; leave it out", param="best_of"
        )
    if body.stream_options and not body.stream:
        raise RequestError("stream_options requires stream to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed; set stream to false", param="prompt_logprobs")


def _answer_options(body: GenerationBody, logprobs: bool) -> AnswerOptions:
    options = body.stream_options or _NO_OPTIONS
    return AnswerOptions(
        include_usage=options.include_usage,
        continuous_usage_stats=options.include_usage and options.continuous_usage_stats,
        token_ids=body.return_token_ids,
        tokens_as_ids=body.return_tokens_as_token_ids,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
    )


def _with_client_names(error: RequestError, names: Mapping[str, str]) -> RequestError:
    param = error.param or ""
    field = re.split(r"[.\[]", param, maxsplit=1)[0]
    if names.get(field, field) == field:
        return error
    return error.with_param(names[field], str(error).replace(param, names[field], 1))
