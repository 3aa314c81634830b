"""What chat and text completions share: sampling, streaming, limits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.answers.base import Answer, Served, error_events
from serve_app.protocol.errors import error_object
from serve_app.protocol.fields import Fields, is_a, is_bool, is_int, is_list_of, short

_SAMPLING = ("n", "temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos")


@dataclass(frozen=True)
class GenerationRequest(ABC):
    """What generating endpoints share. `sampling` holds the SamplingParams fields that the client set."""

    model: str
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool

    @abstractmethod
    def prompt_token_ids(self, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> list[list[int]]:
        """Token ids of each prompt. Raises RequestError where the checkpoint lacks what that takes."""

    @abstractmethod
    def answer(self, served: Served) -> Answer:
        """The form in which this request is answered."""

    def error_body(self, error: Exception) -> dict[str, Any]:
        """What says that this request failed."""
        return error_object(error)

    def error_events(self, error: Exception) -> bytes:
        """What ends a stream whose replica was lost."""
        return error_events(error)

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters; `defaults` (the checkpoint's) apply where the client set nothing."""
        return SamplingParams(**{**defaults, **self.sampling})


def read_shared(fields: Fields, limit_name: str) -> dict[str, Any]:
    """Constructor arguments common to both requests, and the name the client gave its token limit."""
    sampling = fields.present(_SAMPLING)
    if fields.has(limit_name):
        sampling["max_tokens"] = fields.read(limit_name, is_int, "an integer of at least 1")
    stop = fields.read("stop", lambda v: isinstance(v, (str, list)), "a string or a list of strings", None)
    if stop:
        sampling["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(
            fields.read("stop_token_ids", is_list_of(int), "a list of token ids")
        )
    fields.read("ignore_eos", is_bool, "true or false", False)
    options = fields.read("stream_options", is_a(dict), "an object", {})
    include_usage = options.get("include_usage")
    if include_usage is not None and not is_bool(include_usage):
        raise RequestError(
            f"stream_options.include_usage must be true or false, not {short(include_usage)}",
            param="stream_options.include_usage",
        )
    return {
        "model": fields.read("model", is_a(str), "the name of the served model"),
        "sampling": sampling,
        "stream": fields.read("stream", is_bool, "true or false", False),
        "include_usage": bool(include_usage),
        "limit_name": limit_name,
    }


def check_sampling(sampling: dict[str, Any], names: dict[str, str]) -> None:
    """Refuses a bad value here, before a replica is asked; `names` are the client's words for ours."""
    try:
        SamplingParams(**sampling)
    except RequestError as error:
        name = names.get(error.param or "", error.param)
        raise RequestError(str(error).replace(str(error.param), str(name), 1), param=name) from None
