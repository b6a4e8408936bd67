"""An HTTP proxy in front of an S3 endpoint that does to chosen requests what networks and services do on bad days."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OBJECT = re.compile("/[0-9a-f]{2}/[0-9a-f]{64}$")


class Proxy:
    """What to do to which requests.

    Attributes:
        url: Of the proxy.
        n_requests: How many were made, since they were last counted anew.
    """

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.url = ""
        self.n_requests = 0
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._fault = ""
        self._left: int | None = 0
        self._methods: tuple[str, ...] = ()

    def fail(self, fault: str, *methods: str, times: int | None = None) -> None:
        """From now on do this to requests for objects.

        Args:
            fault: `silent` (no answer), `500`, `403`, `reset` (the connection is), `cut` (half of the body), `more` and
                `less` (a length above and below the body's), `flip` (other bytes each time).
            methods: Of the requests; all without any.
            times: Then no more of it; None for ever.
        """
        with self._lock:
            self._fault, self._left, self._methods, self.n_requests = fault, times, methods, 0

    def heal(self) -> None:
        self.fail("", times=0)

    def due(self, method: str, path: str) -> str:
        with self._lock:
            if not _OBJECT.search(path.partition("?")[0]) or (self._methods and method not in self._methods):
                return ""
            self.n_requests += 1
            if self._left is not None:
                if self._left == 0:
                    return ""
                self._left -= 1
            return self._fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    flips = 0

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.proxy.due(self.command, self.path)
        if fault == "silent":
            self.proxy.released.wait(60)
            self.close_connection = True
            return
        if fault == "reset":
            # Close with what was sent still unread, and without the usual farewell.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault in {"500", "403"}:
            self._answer(int(fault), [], b"<Error><Code>AccessDenied</Code></Error>" if fault == "403" else b"")
            return
        status, headers, data = self._forward(body)
        length = len(data)
        if fault == "flip" and data:
            _Handler.flips += 1
            data = bytes([data[0] ^ (1 + _Handler.flips % 200)]) + data[1:]
        if fault == "less":
            length, data = length - 10, data[:-10]
        if fault == "more":
            length += 10
        if fault == "cut":
            data = data[: len(data) // 2]
        self._answer(status, headers, data, length=length, close=bool(fault))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.target, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in {"content-length", "connection", "transfer-encoding", "date", "server"}
            ]
            if self.command == "HEAD":
                kept.append(("content-length", answer.getheader("content-length") or "0"))
            return answer.status, kept, data
        finally:
            connection.close()

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        *,
        length: int | None = None,
        close: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("content-length", str(len(data) if length is None else length))
        if close:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hung up on us, as it may

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):  # it was reset
            super().shutdown_request(request)


@contextmanager
def faulty_proxy(target: str) -> Iterator[Proxy]:
    """A proxy in front of the endpoint, in threads, on the loopback address."""
    proxy = Proxy(target)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with _Server(("127.0.0.1", 0), handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.released.set()
            server.shutdown()
            thread.join()
