"""Errors a user can act on. Each message is one sentence that says what to change."""

from __future__ import annotations

from typing import Any


class QwenDistError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(QwenDistError, ValueError):
    """A model config, engine setting or command-line value that cannot be used.

    `setting` is the path of the setting to blame, outermost name first, where it was read from a mapping.
    """

    setting: tuple[str, ...] = ()


class ParallelLayoutError(ConfigError):
    """A layout that does not divide the model, or that the cluster cannot hold."""


class CheckpointError(QwenDistError):
    """A checkpoint that is missing, damaged, incomplete or of an unsupported kind."""


class RequestError(QwenDistError, ValueError):
    """A request the engine refuses; `param` names the offending field.

    `status` is the HTTP status a server should answer with (400 unless said), `code` OpenAI's word for the error
    where programs tell it by that.
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
    """A prompt, or a prompt and the output that was asked for, for which the context has no room.

    `prompt_tokens` is the length of the prompt, or at least that long where `at_least` is true, `output_tokens`
    what was asked to follow it (0 where the prompt alone is too long), and `max_model_len` what the context holds.
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


class ResourceError(QwenDistError):
    """The machine or cluster lacks what was asked for (ranks, GPUs, memory, a port)."""


class EngineDeadError(QwenDistError):
    """The engine lost a rank or was shut down; its requests cannot be finished."""
