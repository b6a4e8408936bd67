"""Files that are durable and private."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["fsync_folder", "private_file", "private_folder", "private_opener"]


def fsync_folder(folder: str) -> None:
    """Make the entries of a folder durable: a renamed file survives a power cut only after this."""
    if os.name == "nt":  # Windows cannot open a folder; NTFS journals its entries.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def private_opener(path: str, flags: int) -> int:
    """Open a file that only its owner may read; for `open(..., opener=private_opener)` too."""
    return os.open(path, flags, 0o600)


def private_file(path: Path) -> None:
    """Make an empty file that only its owner may read, if there is none.

    For a SQLite database before it is opened: it would take the umask's mode, and its `-wal` and `-shm` take its.
    """
    if not path.exists():
        os.close(private_opener(str(path), os.O_RDWR | os.O_CREAT))


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter, and those above it, where there are none.

    `Path.mkdir(mode, parents=True)` gives the mode to the last one only.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
