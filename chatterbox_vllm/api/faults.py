"""From an exception to an HTTP answer: the one place where that is decided.

Every error has OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``. What is the server's fault says
so and no more; the log has the rest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chatterbox_vllm.api.models import UnknownModel
from chatterbox_vllm.errors import (
    ChatterboxError,
    EngineDead,
    InvalidAudio,
    InvalidRequest,
    MissingDependency,
    Overloaded,
    TooLarge,
    UnknownVoice,
)

logger = logging.getLogger(__name__)


class Fault(NamedTuple):
    """Status, and OpenAI's ``type`` and ``code``."""

    status: int
    kind: str
    code: str


_OURS = Fault(500, "server_error", "internal_error")
# the first class that matches decides
_FAULTS: tuple[tuple[type[Exception], Fault], ...] = (
    (UnknownVoice, Fault(404, "invalid_request_error", "voice_not_found")),
    (UnknownModel, Fault(404, "invalid_request_error", "model_not_found")),
    (TooLarge, Fault(413, "invalid_request_error", "too_large")),
    (InvalidAudio, Fault(400, "invalid_request_error", "invalid_audio")),
    (InvalidRequest, Fault(400, "invalid_request_error", "invalid_value")),
    (Overloaded, Fault(429, "rate_limit_error", "rate_limit_exceeded")),
    (MissingDependency, Fault(501, "server_error", "missing_dependency")),
    (EngineDead, Fault(503, "server_error", "engine_unavailable")),
)
_PLAIN: Mapping[int, tuple[str, str]] = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "unknown_url"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    415: ("invalid_request_error", "unsupported_media_type"),
}


def fault_of(error: Exception) -> Fault:
    """How ``error`` is answered."""
    return next((fault for kind, fault in _FAULTS if isinstance(error, kind)), _OURS)


def describe(error: Exception) -> dict[str, Any]:
    """The body of the answer to ``error``."""
    fault = fault_of(error)
    message = str(error) if fault is not _OURS else "the server failed to answer this request; its log says why"
    return _body(message, fault.kind, getattr(error, "param", None) if fault.status < 500 else None, fault.code)


def respond(error: Exception) -> Response:
    """The answer to ``error``."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    elif isinstance(error, EngineDead):
        headers["Retry-After"] = "5"
    return _response(fault_of(error).status, describe(error), headers)


def install(app: FastAPI) -> None:
    """Answers every error of ``app``."""
    app.add_exception_handler(ChatterboxError, _chatterbox)
    app.add_exception_handler(RequestValidationError, _parameter)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _chatterbox(request: Request, error: Exception) -> Response:
    response = respond(error)
    if response.status_code >= 500 and not isinstance(error, EngineDead):
        logger.error("request %s failed", request.scope.get("request_id"), exc_info=error)
    return response


async def _unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises the error again afterwards, so uvicorn logs it and closes the connection."""
    response = respond(error)
    response.headers["Connection"] = "close"
    response.headers["X-Request-Id"] = request.scope.get("request_id", "")  # this answer passes no middleware
    return response


async def _gone(_request: Request, _error: Exception) -> Response:
    """The client left before its request was whole: nobody reads this."""
    return Response(status_code=400)


async def _parameter(_request: Request, error: Exception) -> Response:
    """A path or query parameter of the wrong type. (Bodies are read by ``schemas``.)"""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    name = str(problem["loc"][-1])
    return respond(InvalidRequest(f"{name}: {problem['msg']}", param=name))


async def _http(request: Request, error: Exception) -> Response:
    """A route that does not exist, a wrong method, a missing key."""
    assert isinstance(error, HTTPException)
    kind, code = _PLAIN.get(error.status_code, ("invalid_request_error", HTTPStatus(error.status_code).name.lower()))
    message = error.detail
    if error.status_code in (404, 405):
        message = f"{error.detail}: {request.method} {request.url.path:.200}"
    return _response(error.status_code, _body(message, kind, None, code), error.headers)


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(status: int, content: dict[str, Any], headers: Mapping[str, str] | None) -> Response:
    # ASCII, because a message may quote text that has no UTF-8 form
    return Response(json.dumps(content), status, headers, media_type="application/json")
