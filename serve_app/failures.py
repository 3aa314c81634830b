"""Bugs as clients see them: a status of 500 and a sentence that leads to the traceback."""

from __future__ import annotations

import logging
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from qwen3_dist.log_file import log_file


def failure(error: Exception, logger: logging.Logger, request_id: str) -> RequestError:
    """What clients are told of `error`, which is a bug. Logs its traceback under `request_id`."""
    logger.error("request %s failed", request_id, exc_info=error)
    return failed(logger, request_id)


def failed(logger: logging.Logger, request_id: str) -> RequestError:
    """An error of status 500 that names the request and the file where `logger` wrote why."""
    file = log_file(logger)
    place = f"{file.name} in the log directory of Ray Serve" if file else "the standard error of the server"
    return RequestError(
        f"the service failed on request {request_id}; {place} has the traceback under that id",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
    )
