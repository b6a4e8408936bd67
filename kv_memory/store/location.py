"""Where a store's parts are: all of it in one folder, or catalog and blobs elsewhere and the folder their local end.

A store is always named by a folder. One that shares a PostgreSQL catalog or an object store says so in `store.json`;
whoever opens the folder later need not know.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import make_url

from kv_memory.errors import ConfigError, StoreError
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_opener

__all__ = ["TIER_SIZE_BYTES", "StorePlace", "find_place", "write_place"]

TIER_SIZE_BYTES = 20 * 10**9
_FILE = "store.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StorePlace:
    """Where catalog and blobs are.

    Attributes:
        catalog: URL of a PostgreSQL database; None for SQLite in the folder.
        blobs: URL of an object store; None for files in the folder.
        tier_size_bytes: What copies of an object store's blobs may take in the folder.
    """

    catalog: str | None = None
    blobs: str | None = None
    tier_size_bytes: int = TIER_SIZE_BYTES

    def __post_init__(self) -> None:
        if self.tier_size_bytes <= 0:
            raise ConfigError(
                f"tier_size_bytes must be above 0, got {self.tier_size_bytes}",
                where="tier_size_bytes",
                next_step="Leave it out for 20 GB.",
            )

    @property
    def embedded(self) -> bool:
        """Whether the folder holds all of it."""
        return self.catalog is None and self.blobs is None


def find_place(
    folder: Path, *, catalog: str | None, blobs: str | None, tier_size_bytes: int | None, new: bool
) -> StorePlace:
    """What was given, else what the folder says, else the folder itself. Nothing is written, see `write_place`.

    Args:
        folder: Of the store; must exist.
        catalog: As in `StorePlace`.
        blobs: As in `StorePlace`.
        tier_size_bytes: As in `StorePlace`; may be changed later.
        new: Whether no store is in the folder yet.

    Raises:
        ConfigError: The store is elsewhere than was given.
        StoreError: `store.json` cannot be read.
    """
    before = _read(folder)
    if before is None:
        size = TIER_SIZE_BYTES if tier_size_bytes is None else tier_size_bytes
        place = StorePlace(catalog=catalog, blobs=blobs, tier_size_bytes=size)
        if not place.embedded and not new:
            raise ConfigError(
                "the folder holds a store with its own catalog and blobs",
                where=str(folder),
                next_step="Name an empty folder for the shared store; `export` and `import` move collections.",
            )
        return place
    for name, given, there in (("catalog", catalog, before.catalog), ("blobs", blobs, before.blobs)):
        if given is not None and not _same(given, there):
            raise ConfigError(
                f"the store has its {name} at {_shown(there)}, not at {_shown(given)}",
                where=str(folder / _FILE),
                next_step=f"Leave {name} out, or name another folder.",
            )
    if tier_size_bytes is not None and tier_size_bytes != before.tier_size_bytes:
        return StorePlace(catalog=before.catalog, blobs=before.blobs, tier_size_bytes=tier_size_bytes)
    return before


def _read(folder: Path) -> StorePlace | None:
    with mapped(folder):
        try:
            text = (folder / _FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
    try:
        data = json.loads(text)
        if data.pop("format") != _FORMAT:
            raise ValueError("another format")
        return StorePlace(**data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"the file that says where the store is cannot be read: {error}",
            where=str(folder / _FILE),
            next_step="Restore it, or write it anew: remove it and open the folder with catalog and blobs named.",
        ) from error


def write_place(folder: Path, place: StorePlace) -> None:
    """Write down where a store is, if it is not all in its folder; after opening it, so that nothing wrong is kept."""
    if place.embedded or place == _read(folder):
        return
    with mapped(folder):
        temporary = folder / f"{_FILE}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8", opener=private_opener) as file:
            json.dump({"format": _FORMAT, **asdict(place)}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / _FILE)
        fsync_folder(str(folder))


def _same(given: str, there: str | None) -> bool:
    return there is not None and given.rstrip("/") == there.rstrip("/")


def _shown(url: str | None) -> str:
    if url is None:
        return "its folder"
    return make_url(url).render_as_string(hide_password=True) if url.startswith("postgresql") else url
