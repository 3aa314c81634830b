"""The errors of this project. Each message is one sentence that says what to change."""

from __future__ import annotations

from typing import Any


class QwenDistError(Exception):
    """The base class of all errors that this project raises for users.

    `setting` is the path of the setting to blame, outermost name first; empty if there is none, or it is not known.
    """

    setting: tuple[str, ...] = ()


class ConfigError(QwenDistError, ValueError):
    """A model config, engine setting or command-line value is invalid."""

    def __init__(self, message: str, setting: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.setting = setting


class ParallelLayoutError(ConfigError):
    """A layout cannot split the model, or does not fit the cluster."""


class CheckpointError(QwenDistError):
    """A checkpoint is missing, damaged, incomplete or of an unsupported kind."""


class RequestError(QwenDistError, ValueError):
    """The engine refuses a request. `param` is the name of the invalid field.

    `status` is the HTTP status for a server's answer. `code` is the error's `code` in OpenAI's API, for errors that
    clients recognise by it.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.param, self.status, self.code)

    def with_param(self, param: str, message: str) -> RequestError:
        """Returns a copy with another `param` and `message`, for an API that names the field otherwise."""
        return RequestError(message, param, self.status, self.code)


class ContextLengthError(RequestError):
    """A prompt, or a prompt with the requested output, exceeds the context length.

    `prompt_tokens` is the length of the prompt, or a lower bound of it if `at_least`. `output_tokens` is the requested
    number of output tokens, 0 if the prompt alone is too long. `max_model_len` is the context length.
    """

    def __init__(
        self,
        message: str,
        param: str,
        prompt_tokens: int,
        max_model_len: int,
        output_tokens: int = 0,
        at_least: bool = False,
    ) -> None:
        super().__init__(message, param, code="context_length_exceeded")
        self.prompt_tokens = prompt_tokens
        self.max_model_len = max_model_len
        self.output_tokens = output_tokens
        self.at_least = at_least

    def __reduce__(self) -> tuple[Any, ...]:
        lengths = (self.prompt_tokens, self.max_model_len, self.output_tokens, self.at_least)
        return type(self), (str(self), self.param, *lengths)

    def with_param(self, param: str, message: str) -> RequestError:
        lengths = (self.prompt_tokens, self.max_model_len, self.output_tokens, self.at_least)
        return ContextLengthError(message, param, *lengths)


class QueueTimeoutError(RequestError):
    """A request has waited `timeout_s` seconds in the engine's queue, the most that it may, without running (429)."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the request waited {timeout_s:g} s for its turn; send it again later", status=429)
        self.timeout_s = timeout_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.timeout_s,)


class ResourceError(QwenDistError):
    """The machine or cluster lacks a resource: ranks, GPUs, memory or a port."""


class EngineDeadError(QwenDistError):
    """The engine lost a rank or was shut down; its requests cannot be finished."""


class PeerLostError(EngineDeadError):
    """Another rank of the group died or stopped answering."""
