"""OpenAI's request and error forms: JSON bodies in, typed requests out, one sentence for a bad one.

A null counts as absent, an unknown field is ignored, a known field of the wrong type or range is a
RequestError that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from qwen3_dist.sampling_params import SamplingParams

ROLES = ("system", "developer", "user", "assistant", "tool")
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_SAMPLING = ("n", "temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos")

# Fields of OpenAI's interface (and its usual extensions) that would change the answer but are not
# built: the values that ask for nothing, by name.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "prompt_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
}


@dataclass(frozen=True)
class GenerationRequest:
    """What both endpoints share. `sampling` holds the SamplingParams fields that the client set."""

    model: str
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters; `defaults` (the checkpoint's) apply where the client set nothing."""
        return SamplingParams(**{**defaults, **self.sampling})


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """A body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """A body of /v1/completions; each prompt is text or token ids."""

    prompts: list[str | list[int]] = field(default_factory=list)


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a chat request. Raises RequestError."""
    fields = _Fields(body)
    shared = _shared(fields, "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens")
    wanted = fields.read("logprobs", _is_bool, "true or false", False)
    top = fields.read("top_logprobs", _is_int, "an integer", None)
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if wanted:
        shared["sampling"]["logprobs"] = top or 0
    shared["sampling"].setdefault("max_tokens", None)
    _check_sampling(shared["sampling"], {"logprobs": "top_logprobs", "max_tokens": shared.pop("limit_name")})
    return ChatRequest(
        **shared,
        messages=[
            _message(m, i)
            for i, m in enumerate(fields.read("messages", _is_filled_list, "a list of at least one message"))
        ],
        tools=fields.read("tools", lambda v: v == [] or _is_list_of(dict)(v), "a list of objects", None),
        template_kwargs=fields.read(
            "chat_template_kwargs",
            lambda v: isinstance(v, dict) and not v.keys() & {"self", "messages", "tools"},
            "an object of template variables other than messages and tools",
            {},
        ),
    )


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a completion request. Raises RequestError."""
    fields = _Fields(body)
    shared = _shared(fields, "max_tokens")
    logprobs = fields.read("logprobs", _is_int, "an integer", None)
    if logprobs is not None:
        shared["sampling"]["logprobs"] = logprobs
    shared["sampling"].setdefault("max_tokens", COMPLETION_MAX_TOKENS)
    shared.pop("limit_name")
    _check_sampling(shared["sampling"], {})
    return CompletionRequest(**shared, prompts=_prompts(fields))


def error_status(error: Exception) -> int:
    """The HTTP status that `error` is answered with."""
    if isinstance(error, RequestError):
        return error.status
    return (
        HTTPStatus.SERVICE_UNAVAILABLE
        if isinstance(error, EngineDeadError)
        else HTTPStatus.INTERNAL_SERVER_ERROR
    )


def error_object(error: Exception) -> dict[str, Any]:
    """OpenAI's error object. The text of an error that is none of ours stays in the log."""
    status = error_status(error)
    message = (
        str(error)
        if isinstance(error, QwenDistError)
        else "the service failed on this request; its log says why"
    )
    return error_form(message, status, getattr(error, "param", None))


def error_form(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object for `message` and HTTP `status`."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    code = "model_not_found" if status == HTTPStatus.NOT_FOUND and param == "model" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class _Fields:
    """A JSON object whose fields are read by name, kind and default; null is absent."""

    def __init__(self, body: bytes) -> None:
        try:
            raw = pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RequestError(f"the request body is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise RequestError("the request body must be a JSON object")
        self._raw = {name: value for name, value in raw.items() if value is not None}
        for name, neutral in _NOT_BUILT.items():
            if name in self._raw and self._raw[name] not in neutral:
                raise RequestError(
                    f"{name}={_short(self._raw[name])} is not supported yet; leave it out", param=name
                )

    def has(self, name: str) -> bool:
        return name in self._raw

    def read(self, name: str, ok: Callable[[Any], bool], expected: str, *default: Any) -> Any:
        """Field `name`, or the default. Raises RequestError if it is not `ok`, or absent without a default."""
        if name not in self._raw and default:
            return default[0]
        if name not in self._raw:
            raise RequestError(f"{name} is required: {expected}", param=name)
        value = self._raw[name]
        if not ok(value):
            raise RequestError(f"{name} must be {expected}, not {_short(value)}", param=name)
        return value

    def present(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: self._raw[name] for name in names if name in self._raw}


def _shared(fields: _Fields, limit_name: str) -> dict[str, Any]:
    """Constructor arguments common to both requests, and the name the client gave its token limit."""
    sampling = fields.present(_SAMPLING)
    if fields.has(limit_name):
        sampling["max_tokens"] = fields.read(limit_name, _is_int, "an integer of at least 1")
    stop = fields.read("stop", lambda v: isinstance(v, (str, list)), "a string or a list of strings", None)
    if stop:
        sampling["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(
            fields.read("stop_token_ids", _is_list_of(int), "a list of token ids")
        )
    fields.read("ignore_eos", _is_bool, "true or false", False)
    options = fields.read("stream_options", _is_a(dict), "an object", {})
    include_usage = options.get("include_usage")
    if include_usage is not None and not _is_bool(include_usage):
        raise RequestError(
            f"stream_options.include_usage must be true or false, not {_short(include_usage)}",
            param="stream_options.include_usage",
        )
    return {
        "model": fields.read("model", _is_a(str), "the name of the served model"),
        "sampling": sampling,
        "stream": fields.read("stream", _is_bool, "true or false", False),
        "include_usage": bool(include_usage),
        "limit_name": limit_name,
    }


def _check_sampling(sampling: dict[str, Any], names: dict[str, str]) -> None:
    """Refuses a bad value here, before a replica is asked; `names` are the client's words for ours."""
    try:
        SamplingParams(**sampling)
    except RequestError as error:
        name = names.get(error.param or "", error.param)
        raise RequestError(str(error).replace(str(error.param), str(name), 1), param=name) from None


def _message(message: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(
            f"{where} must be an object with role and content, not {_short(message)}", param=where
        )
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(ROLES)}, not {_short(role)}", param=f"{where}.role"
        )
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and role == "assistant"):
        raise RequestError(
            f"{where}.content must be a string or a list of text parts, not {_short(content)}",
            param=f"{where}.content",
        )
    # OpenAI's newer name for the system role; Qwen3's templates know the older one.
    return {**message, "role": "system"} if role == "developer" else message


def _prompts(fields: _Fields) -> list[str | list[int]]:
    """The `prompt` field's four forms (text, token ids, a list of either) as a list of prompts."""
    expected = "text, a list of token ids, or a list of either"
    prompt = fields.read("prompt", lambda v: isinstance(v, (str, list)), expected)
    prompts = [prompt] if isinstance(prompt, str) or _is_list_of(int)(prompt) else prompt
    for item in prompts:
        if not isinstance(item, str) and not _is_list_of(int)(item):
            raise RequestError(f"prompt must be {expected}, not {_short(prompt)}", param="prompt")
    if not prompts or any(not item for item in prompts):
        raise RequestError("prompt must not be empty", param="prompt")
    return list(prompts)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    ok = _is_int if kind is int else _is_a(kind)
    return lambda value: isinstance(value, list) and bool(value) and all(map(ok, value))


def _is_filled_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)
