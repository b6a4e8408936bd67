"""ServeSettings: the limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from kv_memory.config import check_at_least, check_fields


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of a server.

    The command line shows these lines as the help of its options.

    Attributes:
        max_tokens (N): Largest number of tokens that a request may ask for.
        default_tokens (N): Number of tokens of an answer whose request names no limit.
        max_batch (N): Largest number of answers that are decoded together.
        max_queue (N): Largest number of requests that wait for a place among these; further ones are refused with 429.
        max_jobs (N): Largest number of waiting jobs that add documents; further ones are refused with 429.
        max_body_bytes (N): Largest body of a request in bytes; further bytes are refused with 413.
        max_upload_bytes (N): Largest body of a request that adds documents, in bytes.
        max_connections (N): Largest number of open connections; further ones are refused with 503.
        request_timeout_s (SECONDS): Longest time for an answer, in seconds, with the time in the queue.
        client_timeout_s (SECONDS): Longest time in seconds that a client may take to send the next part of a request,
            or to take the next part of a response.
        stop_timeout_s (SECONDS): Longest time in seconds that running requests have to end after SIGTERM.
        allowed_hosts (HOSTS): Names under which clients may address the server, with commas between them, e.g. those of
            a proxy; `*` for any. Without any, a server on a loopback address accepts loopback names only, and another
            one accepts any.
        allowed_origins (ORIGINS): Web pages that may call the server from a browser (CORS), e.g.
            `https://chat.example.com`, with commas between them.
    """

    max_tokens: int = 4096
    default_tokens: int = 512
    max_batch: int = 16
    max_queue: int = 64
    max_jobs: int = 100
    max_body_bytes: int = 4 * 2**20
    max_upload_bytes: int = 64 * 2**20
    max_connections: int = 512
    request_timeout_s: float = 300.0
    client_timeout_s: float = 30.0
    stop_timeout_s: float = 30.0
    allowed_hosts: str | None = None
    allowed_origins: str | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_tokens", "default_tokens", "max_batch", "max_jobs")
        check_at_least(self, 1, "max_body_bytes", "max_upload_bytes", "max_connections")
        check_at_least(self, 0, "max_queue")
        for name in ("request_timeout_s", "client_timeout_s", "stop_timeout_s"):
            check_fields(self, **{name: (getattr(self, name) > 0, "above 0")})

    @property
    def hosts(self) -> tuple[str, ...]:
        """`allowed_hosts`, one by one."""
        return tuple(each.strip().lower() for each in (self.allowed_hosts or "").split(",") if each.strip())

    @property
    def origins(self) -> tuple[str, ...]:
        """`allowed_origins`, one by one."""
        return tuple(
            each.strip().lower().rstrip("/") for each in (self.allowed_origins or "").split(",") if each.strip()
        )
