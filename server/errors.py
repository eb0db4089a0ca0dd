"""Errors that only a server over HTTP has, and every error as the body that its route promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from pulse_ecg.call import error_outcome
from pulse_ecg.errors import (
    ImageError,
    ModelLoadingError,
    PromptTooLongError,
    PulseError,
    QueueFullError,
    RequestError,
)

NATIVE_PATHS = frozenset({"/", "/predict"})
OPENAI_PREFIX = "/v1/"

# Seconds after which another try is worth while.
_RETRY_AFTER = {429: "2", 503: "10"}


class UnauthorizedError(RequestError):
    """No token, or not the one that is asked for."""

    status = 401


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""

    status = 408


class DrainingError(ModelLoadingError):
    """The server is shutting down and begins nothing new."""


class DisconnectedError(Exception):
    """The caller is gone: there is nobody to answer."""


class ChatFieldError(RequestError):
    """A field of a chat completion request cannot be used; ``param`` names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def error_response(path: str, error: PulseError, model: str) -> Response:
    """An error in the shape of the route that ``path`` belongs to, with its status and headers."""
    headers = retry_headers(error.status)
    if path in NATIVE_PATHS:
        return JSONResponse([error_outcome(error, model).record], error.status, headers)
    if path.startswith(OPENAI_PREFIX):
        return JSONResponse(openai_error(error), openai_status(error), headers)
    return JSONResponse({"error": str(error)}, error.status, headers)


def route_error_response(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """For a path or method that there is not."""
    if path.startswith(OPENAI_PREFIX):
        return JSONResponse(openai_error(ChatFieldError(message, status=status)), status, headers)
    return JSONResponse({"error": message}, status, headers)


def retry_headers(status: int) -> dict[str, str]:
    """The headers that belong to an error's status."""
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": _RETRY_AFTER[status]} if status in _RETRY_AFTER else {}


def openai_status(error: PulseError) -> int:
    """OpenAI knows no 422: a value that cannot be used is a 400 there."""
    return 400 if error.status == 422 else error.status


def openai_error(error: PulseError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}`` as OpenAI's clients read it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    param, code = None, None
    if isinstance(error, ChatFieldError):
        param, code = error.param, error.code
    elif isinstance(error, UnauthorizedError):
        code = "invalid_api_key"
    elif isinstance(error, QueueFullError):
        kind, code = "rate_limit_error", "rate_limit_exceeded"
    elif isinstance(error, PromptTooLongError):
        param, code = "messages", "context_length_exceeded"
    elif isinstance(error, ImageError):
        param, code = "messages", "invalid_image"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
