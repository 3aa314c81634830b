"""Errors a user can act on. Each message is one sentence that says what to change."""


class QwenDistError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(QwenDistError, ValueError):
    """A model config, engine setting or command-line value that cannot be used."""


class ParallelLayoutError(ConfigError):
    """A layout that does not divide the model, or that the cluster cannot hold."""


class CheckpointError(QwenDistError):
    """A checkpoint that is missing, damaged, incomplete or of an unsupported kind."""


class RequestError(QwenDistError, ValueError):
    """A request the engine refuses; `param` names the offending field.

    `status` is the HTTP status a server should answer with (400 unless said).
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, str | None, int]]:
        return type(self), (str(self), self.param, self.status)


class ResourceError(QwenDistError):
    """The machine or cluster lacks what was asked for (ranks, GPUs, memory, a port)."""


class EngineDeadError(QwenDistError):
    """The engine lost a rank or was shut down; its requests cannot be finished."""
