"""Errors that are bugs: logged with their traceback, and answered with 500 and where to find it."""

from __future__ import annotations

import logging
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from qwen3_dist.log_file import log_file


def log_internal_error(error: Exception, logger: logging.Logger, request_id: str) -> RequestError:
    """Logs the traceback of `error` under `request_id`. Returns the error to answer with, of status 500, which
    names the request and the log file."""
    logger.error("request %s failed", request_id, exc_info=error)
    file = log_file(logger)
    place = f"{file.name} in the log directory of Ray Serve" if file else "the standard error of the server"
    return RequestError(
        f"the service failed on request {request_id}; {place} has the traceback under that id",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
    )
