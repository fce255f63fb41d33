"""Errors as OpenAI's API reports them: a status code, and a body with `message`, `type`, `param` and `code`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    InputError,
    LatteFlowError,
    QueueFullError,
    ServiceError,
    one_line,
)
from runtime.gateway.schema import ChatBody, ImagesBody

FIELD_OF_ARGUMENT = {"num_images": "n", "max_new_tokens": "max_tokens"}
"""Fields whose argument in the service, with which its messages begin, has another name."""
CLIENT_CLOSED = 499
"""Nobody reads it: the client closed the connection. It is counted and logged."""


@dataclass
class ApiError(Exception):
    """An error that a client sees."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    """In seconds."""

    @property
    def kind(self) -> str:
        """OpenAI's name of the kind of error."""
        by_status = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return by_status.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def api_error(error: BaseException) -> ApiError:
    """Returns what a client sees of an error. Of one that nobody expected it sees nothing: the log has it."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, LatteFlowError):
        return ApiError(500, "internal error; see the gateway's log", "internal_error")
    message = one_line(error)
    if isinstance(error, InputError):
        return ApiError(400, message, "invalid_value")
    if isinstance(error, QueueFullError):
        return ApiError(429, message, "rate_limit_exceeded", retry_after=error.retry_after or 1)
    if isinstance(error, DrainingError):
        return ApiError(503, message, "shutting_down", retry_after=5)
    if isinstance(error, DeadlineError):
        return ApiError(504, message, "deadline_exceeded")
    if isinstance(error, CancelledError):
        return ApiError(CLIENT_CLOSED, message, "cancelled")
    if isinstance(error, ServiceError):
        return ApiError(503, message, "service_unavailable")
    return ApiError(500, message, "engine_error")


def with_field(failure: ApiError) -> ApiError:
    """Returns an error with the field that its message begins with, by the name that the client sent."""
    word, _, rest = failure.message.partition(" ")
    field = FIELD_OF_ARGUMENT.get(word, word)
    if failure.param is not None or not (field in ImagesBody.model_fields or field in ChatBody.model_fields):
        return failure
    return replace(failure, message=f"{field} {rest}", param=field)
