"""A worker that writes down what it does, waits where it is told to, and dies over poison.

Its log, `ODD_LOG`, is shared by all workers: lines of a word, a process id, and a text's hash or a number of bytes.
`ODD_GATE` names a file: after `ODD_PASS` texts, every other one is begun and then waits until the file is there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from kv_memory.compress import Compressor
from kv_memory.jobs.worker import main
from kv_memory.store import Store

_PATH = Path(os.environ["ODD_LOG"])
_LOG = os.open(_PATH, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_STATM = Path("/proc/self/statm")
_compress, _put = Compressor.compress, Store.put


def _tell(word: str, what: object) -> None:
    os.write(_LOG, f"{word} {os.getpid()} {what}\n".encode())


def _wait(sha: str) -> None:
    gate = os.environ.get("ODD_GATE")
    if gate is None:
        return
    begun = [line for line in _PATH.read_text().splitlines() if line.startswith("begun")]
    if begun.index(f"begun {os.getpid()} {sha}") < int(os.environ["ODD_PASS"]):
        return
    while not os.path.exists(gate):
        time.sleep(0.02)


def compress(self: Compressor, text: str, **options: Any) -> Any:
    if "poison" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    sha = hashlib.sha256(text.encode()).hexdigest()
    _tell("begun", sha)
    _wait(sha)
    time.sleep(float(os.environ.get("ODD_SLEEP_S", "0")))
    return _compress(self, text, **options)


def put(self: Store, text_sha256: str, cache: Any, **options: Any) -> Any:
    info = _put(self, text_sha256, cache, **options)
    _tell("stored", text_sha256)
    if _STATM.exists():
        _tell("resident", int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return info


if __name__ == "__main__":
    Compressor.compress, Store.put = compress, put  # type: ignore[method-assign]
    main()
    _tell("ended", 0)
    os._exit(0)
