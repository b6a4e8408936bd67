"""Names of workers and jobs."""

from __future__ import annotations

import socket
import uuid
from datetime import UTC, datetime

__all__ = ["job_name", "worker_name"]


def worker_name() -> str:
    """A name no other worker has, on any machine; begins with this one's."""
    return f"{socket.gethostname()[:100]}-{uuid.uuid4().hex[:12]}"


def job_name() -> str:
    """A name for a job that was given none: the time, so that they sort, and a little chance."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
