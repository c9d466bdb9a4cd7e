"""Who may ask, how much at once, and how long a body may be. The first two are settled before a body is read."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fasa_trt.serving.openai.errors import ApiError

RETRY_AFTER = 1  # seconds; clients wait longer by themselves when they are refused again


class Admission:
    """Counts answers that are being made or wait for their turn; at most `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    def enter(self, count: int) -> None:
        """Raises ApiError when there is no room; otherwise `leave` must follow."""
        if count > self.capacity:
            raise ApiError(400, f"{count} answers in one request: this server takes {self.capacity} at once", param="n")
        if self.taken + count > self.capacity:
            raise ApiError(
                429,
                f"the queue is full: {self.taken} of {self.capacity} places are taken",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        self.taken += count

    def leave(self, count: int) -> None:
        self.taken -= count


class BearerAuth:
    """Middleware: /v1 is for those who know the key. Probes and metrics stay open."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    401,
                    "a valid API key is needed: send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimit:
    """Middleware: reads a request's body, at most `max_bytes` of it, and refuses what is longer with 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        parts: list[bytes] = []
        size, more = 0, True
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:  # no need to read it
            size, more = int(declared[:20]), False
        while more and size <= self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > self.max_bytes:
            error = ApiError(
                413,
                f"the body is longer than {self.max_bytes} bytes",
                code="body_too_long",
                headers={"Connection": "close"},
            )
            return await error.response()(scope, receive, send)
        body = b"".join(parts)
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)
