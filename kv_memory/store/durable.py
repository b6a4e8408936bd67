"""Making renames durable."""

from __future__ import annotations

import os

__all__ = ["fsync_folder"]


def fsync_folder(folder: str) -> None:
    """Make the entries of a folder durable: a renamed file survives a power cut only after this."""
    if os.name == "nt":  # Windows cannot open a folder; NTFS journals its entries.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
