"""A worker that writes every compression down, takes its time, and dies over poison."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from typing import Any

from kv_memory.compress import Compressor
from kv_memory.jobs.worker import main
from kv_memory.store import Store

_LOG = os.open(os.environ["ODD_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_compress, _put = Compressor.compress, Store.put


def _tell(word: str, sha: str) -> None:
    os.write(_LOG, f"{word} {os.getpid()} {sha}\n".encode())


def compress(self: Compressor, text: str, **options: Any) -> Any:
    if "poison" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    _tell("begun", hashlib.sha256(text.encode()).hexdigest())
    time.sleep(float(os.environ.get("ODD_SLEEP_S", "0")))
    return _compress(self, text, **options)


def put(self: Store, text_sha256: str, cache: Any, **options: Any) -> Any:
    info = _put(self, text_sha256, cache, **options)
    _tell("stored", text_sha256)
    return info


if __name__ == "__main__":
    Compressor.compress, Store.put = compress, put  # type: ignore[method-assign]
    code = main()
    sys.stdout.flush()
    os._exit(code)
