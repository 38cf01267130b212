"""What a client is told when a request is not answered: OpenAI's error object, and nothing of ours beside the
message."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from vltrain.errors import one_line

INVALID = "invalid_request_error"
MAX_MESSAGE_CHARACTERS = 1000  # a message quotes what the client sent


class ApiError(Exception):
    """A request that is not answered.

    status: of HTTP; param: the field at fault; retry_after_seconds: when another try may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind, self.retry_after_seconds = (
            status,
            param,
            code,
            kind,
            retry_after_seconds,
        )

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        message = one_line(str(self))
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = f"{message[:MAX_MESSAGE_CHARACTERS]} ..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_seconds is None else {"retry-after": str(self.retry_after_seconds)}
        if self.status == 401:
            headers["www-authenticate"] = (
                'Basic realm="vltrain", charset="UTF-8"'  # lets a browser ask for the key of the page
            )
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake in a field of its request."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, retry_after_seconds: int = 5) -> ApiError:
    """More requests than may wait."""
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", retry_after_seconds=retry_after_seconds)


def unavailable(message: str, code: str, retry_after_seconds: int = 10) -> ApiError:
    """The server's own state forbids an answer now."""
    return ApiError(503, message, kind="server_error", code=code, retry_after_seconds=retry_after_seconds)


def internal() -> ApiError:
    """An error of ours; what it was is in the server's log alone."""
    return ApiError(500, "internal error; the server's log says more", kind="server_error", code="internal_error")
