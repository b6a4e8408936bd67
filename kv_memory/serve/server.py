"""Run the application under uvicorn: where it binds, and how it stops."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kv_memory.errors import ConfigError
from kv_memory.serve.keys import Keys
from kv_memory.serve.settings import ServeSettings


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int, keys: Keys) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: The address is taken or not this machine's, or others can reach it and no key is valid.
    """
    if not is_loopback(host) and all(key.revoked_at is not None for key in keys.list()):
        raise ConfigError(
            f"{host} can be reached from other machines, and the store has no key",
            where="host",
            next_step="Create one with `kv-memory keys create NAME`, or leave out --host.",
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            where="port",
            next_step="Choose another --port (0 for any that is free) or --host.",
        ) from error


class Server(uvicorn.Server):
    """A uvicorn server that reports when it accepts requests.

    On SIGTERM and SIGINT it accepts no more, and running requests have `stop_timeout_s` to end; those that have not are
    cancelled, which stops decoding within a token.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings, on_ready: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,  # of no use without the texts, which do not belong into logs; /metrics counts requests
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=max(1, round(settings.stop_timeout_s)),
        )
        super().__init__(config)
        self._on_ready = on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, which would raise the signal again at the end: the store must still be closed then."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()
