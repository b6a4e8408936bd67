"""What is checked of every request before anything else: its host and origin, and the size and pace of its body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kv_memory.serve.errors import ApiError, response_for
from kv_memory.serve.metrics import Metrics
from kv_memory.serve.settings import ServeSettings

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_UPLOADS = "/v1/documents"
_NO_BODY = {"GET", "HEAD", "DELETE", "OPTIONS"}


class Limits:
    """ASGI middleware for the limits of `ServeSettings`.

    A body is received whole before the application sees it: nothing works on a request that is still incomplete, and
    Starlette's own parsers have no limit.

    Args:
        app: Application behind it.
        settings: Limits.
        hosts: Names under which the server may be addressed; empty for any. A page in a browser can make a name of its
            own point to 127.0.0.1 (DNS rebinding), but not change the name it sends.
        metrics: Counters.
    """

    def __init__(self, app: ASGIApp, *, settings: ServeSettings, hosts: tuple[str, ...], metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._hosts = hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check_caller(Headers(scope=scope))
                body = await self._body(scope, receive)
            except ApiError as error:
                made = response_for(error)
                made.headers["Connection"] = "close"  # the rest of the body is not received
                await made(scope, receive, noted)
                return
            if body is not None:
                await self._app(scope, _replay(body, receive), noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # not the path, which may be anything
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started_s)

    def _check_caller(self, headers: Headers) -> None:
        host = _host_of(headers.get("host", ""))
        if self._hosts and "*" not in self._hosts and host not in self._hosts:
            raise ApiError(
                403, f"this server is not called {host!r}; --allowed-hosts admits other names", code="wrong_host"
            )
        # A page of any site can make a browser post a form here, without seeing the response (CSRF).
        origin = headers.get("origin")
        if origin is None or {origin.lower(), "*"} & set(self._settings.origins):
            return
        if _host_of(origin.partition("://")[2]) != host:
            raise ApiError(
                403, f"pages of {origin!r} may not call this server; see --allowed-origins", code="wrong_origin"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client has disconnected."""
        is_upload = scope["path"].startswith(_UPLOADS)
        most = self._settings.max_upload_bytes if is_upload else self._settings.max_body_bytes
        too_large = ApiError(413, f"a body of more than {most:,} bytes", code="body_too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > most:
            raise too_large
        parts = bytearray()
        while True:
            try:
                message = await asyncio.wait_for(receive(), self._settings.client_timeout_s)
            except TimeoutError:
                raise ApiError(408, "the rest of the request did not come in time", code="request_timeout") from None
            if message["type"] == "http.disconnect":
                return None
            parts += message.get("body", b"")
            if len(parts) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(parts)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A `receive` that gives the body, and then what the server says: that the client has disconnected."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host_of(header: str) -> str:
    """The name in a `Host` header, without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
