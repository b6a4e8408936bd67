"""Getting what was deleted out of the files of a SQLite database: its free pages, its write-ahead log."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from kv_memory.errors import StoreLockedError
from kv_memory.store.error_mapping import mapped

__all__ = ["scrub_sqlite"]

_LONGEST_S = 30.0


def scrub_sqlite(file: Path) -> None:
    """Write a database anew, from what is in it, and empty its write-ahead log. A file that is not there is left so.

    Raises:
        StoreLockedError: Others read or write it all the time, for 30 s.
        StoreFullError: There is no room for a copy of it.
    """
    if not file.is_file():
        return
    deadline = time.monotonic() + _LONGEST_S
    with mapped(file), closing(sqlite3.connect(file, timeout=_LONGEST_S, isolation_level=None)) as connection:
        # New pages are zeroed, where SQLite would leave in them what the memory held before: pages it has just read.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("VACUUM")
        # VACUUM wrote into the log; the pages before it are in the file until they are copied over, and in the log
        # until that is cut off. Neither happens while somebody reads an older state.
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                raise StoreLockedError(
                    "somebody reads the database all the time, so what was deleted is still in its log",
                    where=str(file),
                    next_step="Stop what else uses the store, then run `kv-memory remove --purge` once more.",
                )
            time.sleep(0.01)
