"""Every error leaves as OpenAI's error object, so that its clients raise the right exception with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}


class ApiError(Exception):
    """message: for the client. param: the request's field that is wrong. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def handle_errors(app: FastAPI) -> None:
    """Installs the handlers. What is no ApiError by then is a mistake in the code: uvicorn logs its traceback."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers
        ).response()

    @app.exception_handler(Exception)
    async def mistake(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"unexpected {type(error).__name__}; the server's log has the details").response()


def _from_validation(errors: Any) -> ApiError:
    """One line for the first field that is wrong. A field that may be several things has an error for each of them."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    field = first["loc"][1] if len(first["loc"]) > 1 else None
    if first["type"] == "value_error":
        return ApiError(400, str(first["ctx"]["error"]))
    if field is None:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json")
    own = [error for error in errors if error["loc"][1:2] == (field,)]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported", param=str(field), code="unknown_parameter")
    reasons = "; or ".join(dict.fromkeys(str(error["msg"]) for error in own[:4]))
    return ApiError(400, f"{field}: {reasons}", param=str(field))
