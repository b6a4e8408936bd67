"""Errors as HTTP responses in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kv_memory import errors
from kv_memory.errors import KVMemoryError

_log = logging.getLogger(__name__)
_RETRY_S = 2  # what a client should wait for a place in the queue

# The first match counts, so subclasses come first. Type and code are those that OpenAI's clients know, where there are.
_KINDS: tuple[tuple[type[KVMemoryError], int, str, str], ...] = (
    (errors.QueueFullError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.ContextWindowError, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.DocumentNotFoundError, 404, "invalid_request_error", "document_not_found"),
    (errors.TextNotKeptError, 409, "invalid_request_error", "text_not_kept"),
    (errors.DocumentError, 400, "invalid_request_error", "invalid_document"),
    (errors.FingerprintMismatchError, 409, "invalid_request_error", "fingerprint_mismatch"),
    (errors.CacheNotFoundError, 409, "invalid_request_error", "cache_not_found"),
    (errors.JobError, 409, "invalid_request_error", "job_conflict"),
    (errors.DecodeTimeoutError, 504, "server_error", "timeout"),
    (errors.UnsupportedRequestError, 400, "invalid_request_error", "unsupported"),
    (errors.ConfigError, 400, "invalid_request_error", "invalid_value"),
    (errors.StoreFullError, 507, "server_error", "store_full"),
    (errors.StoreLockedError, 503, "server_error", "store_locked"),
    (errors.StoreConnectionError, 503, "server_error", "store_unavailable"),
)
_STATUS_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorBody


class ApiError(Exception):
    """An error that only exists over HTTP: a missing key, an unknown model, a body that is too large."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = _STATUS_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = ErrorBody(message=message, type=kind, param=param, code=code)


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """Status and body for an error; the details of one that is the server's own go to the log only."""
    if isinstance(error, ApiError):
        return error.status, error.body
    for kind, status, type_, code in _KINDS:
        if isinstance(error, kind):
            if status >= 500:
                _log.error("%s: %s", type(error).__name__, error)
            # `where` of an error of the store names files of the server.
            about = KVMemoryError(error.what, next_step=error.next_step) if status >= 500 else error
            param = error.where if isinstance(error, errors.ConfigError) else None
            return status, ErrorBody(message=str(about), type=type_, param=param, code=code)
    _log.error("%s", error, exc_info=error)
    what = error.what if isinstance(error, KVMemoryError) else "the server failed; its log has the details"
    return 500, ErrorBody(message=what, type="server_error", code="internal_error")


def response_for(error: Exception) -> JSONResponse:
    """The response for an error."""
    status, body = describe(error)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in {429, 503}:
        headers["Retry-After"] = str(_RETRY_S)
    return JSONResponse(ErrorResponse(error=body).model_dump(), status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Make the app answer every error in this shape."""

    async def on_error(_: Request, error: Exception) -> JSONResponse:
        return response_for(error)

    async def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_for(_invalid(error.errors()))

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        made = response_for(ApiError(error.status_code, f"{error.detail}", code=code))
        made.headers.update(error.headers or {})
        return made

    app.add_exception_handler(KVMemoryError, on_error)
    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)


def _invalid(found: Sequence[Any]) -> ApiError:
    """The error for a request that does not fit its schema. The input itself is not repeated: it may be anything."""
    first = found[0]
    place = [str(part) for part in first["loc"] if part not in {"body", "query", "path", "header"}]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", code="unknown_field", param=param)
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return ApiError(400, f"{param or 'body'}: {first['msg']}{more}", code="invalid_value", param=param)


OPENAPI: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is malformed, or cannot be fulfilled."},
    401: {"model": ErrorResponse, "description": "The key is missing or unknown."},
    403: {"model": ErrorResponse, "description": "The key's scope does not allow it."},
    404: {"model": ErrorResponse, "description": "There is no such model, collection, document or job."},
    409: {"model": ErrorResponse, "description": "The caches were made by another model, adapter or prompt."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    429: {"model": ErrorResponse, "description": "The queue is full; try again after `Retry-After` seconds."},
    503: {"model": ErrorResponse, "description": "The store does not answer; try again."},
    "default": {"model": ErrorResponse, "description": "Another error."},  # and FastAPI adds no 422 of its own
    504: {"model": ErrorResponse, "description": "The answer took too long."},
    507: {"model": ErrorResponse, "description": "No space is left to store it."},
}
