"""Durable and private files and folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path


def fsync_folder(folder: str) -> None:
    """Make the entries of a folder durable, because a renamed file survives a power cut only after this."""
    if os.name == "nt":  # Windows cannot open a folder; NTFS journals its entries.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def walk_files(folder: Path | str) -> Iterator[tuple[str, os.stat_result]]:
    """Paths and states of all files under a folder, without those that another process removes meanwhile."""
    for base, _, names in os.walk(folder):
        for path in (os.path.join(base, name) for name in names):
            with suppress(FileNotFoundError):
                yield path, os.lstat(path)


# For `open(..., opener=private_opener)`: a new file may only be read by its owner.
private_opener = partial(os.open, mode=0o600)


def private_file(path: Path) -> None:
    """Create an empty file that only its owner may read, unless the file exists.

    Call it before a SQLite database is opened: SQLite would create the file with the umask's mode, and `-wal` and
    `-shm` inherit the mode of the file.
    """
    if not path.exists():
        os.close(private_opener(str(path), os.O_RDWR | os.O_CREAT))


def private_folder(path: Path) -> None:
    """Create a folder, and missing ones above it, that only the owner may enter.

    `Path.mkdir(mode, parents=True)` would give the mode to the last one only.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
