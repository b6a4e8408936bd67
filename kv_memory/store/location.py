"""Location of a store's parts: all in one folder, or catalog and blobs elsewhere with the folder as their local end.

A store is always named by a folder. `store.json` in it records a shared PostgreSQL catalog or object store, so that
neither need be given when the folder is opened later.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sqlalchemy import make_url

from kv_memory.errors import ConfigError, StoreError
from kv_memory.store.blobs.local import check_folder
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_folder, private_opener

CATALOG_FILE = "catalog.sqlite"
_FILE = "store.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StorePlace:
    """Location of catalog and blobs.

    Attributes:
        catalog: URL of a PostgreSQL database; None for SQLite in the folder.
        blobs: URL of an object store; None for files in the folder.
        tier_size_bytes: Size limit in bytes for local copies of an object store's blobs.
    """

    catalog: str | None = None
    blobs: str | None = None
    tier_size_bytes: int = 20 * 10**9

    def __post_init__(self) -> None:
        if self.tier_size_bytes <= 0:
            raise ConfigError(
                f"tier_size_bytes must be above 0, got {self.tier_size_bytes}",
                where="tier_size_bytes",
                next_step="Leave it out for the default of 20 GB.",
            )

    @property
    def embedded(self) -> bool:
        """Whether the folder holds both catalog and blobs."""
        return self.catalog is None and self.blobs is None


def prepare_folder(path: Path | str, *, create: bool) -> Path:
    """The absolute path of a store's folder, made if it is missing.

    Raises:
        StoreError: There is no store and `create` is off, or the path has the name of an environment variable in it;
            the folder is not readable and writable.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))
    check_folder(folder)
    with mapped(folder):
        if not create:
            _check_there(folder)
        private_folder(folder)
        # Checked first, because SQLite's own error for a forbidden folder comes late and says "unable to open".
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise StoreError(
                "no permission to read and write the store's folder",
                where=str(folder),
                next_step="Give your user read and write permission on it, or open a store somewhere else.",
            )
        for name in ("blobs", "quarantine"):
            private_folder(folder / name)
    return folder


def _check_there(folder: Path) -> None:
    if not any((folder / name).is_file() for name in (CATALOG_FILE, _FILE)):
        raise StoreError(
            "there is no store in this folder",
            where=str(folder),
            next_step="Create one with `kv-memory add FILE`, or give the folder of a store with `--store`.",
        )


def catalog_of(path: Path | str) -> Path | str:
    """Location of the catalog of a store's folder, for `Catalog`; nothing is opened.

    Raises:
        StoreError: The folder has no store.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))
    _check_there(folder)
    place = _read(folder)
    return (place and place.catalog) or folder / CATALOG_FILE


def find_place(folder: Path, *, catalog: str | None, blobs: str | None, tier_size_bytes: int | None) -> StorePlace:
    """The given location, else the one recorded in the folder, else the folder itself; nothing is written.

    The arguments are those of `StorePlace`, None if not given; `tier_size_bytes` may differ from the recorded one.

    Raises:
        ConfigError: The store is at another location than the given one.
        StoreError: `store.json` cannot be read.
    """
    place = _read(folder)
    if place is None:
        place = StorePlace(catalog=catalog, blobs=blobs)
        if not place.embedded and (folder / CATALOG_FILE).is_file():
            raise ConfigError(
                "the folder already contains a store with its own catalog and blobs",
                where=str(folder),
                next_step="Use an empty folder for the shared store; `export` and `import` move collections.",
            )
    for name, given, there in (("catalog", catalog, place.catalog), ("blobs", blobs, place.blobs)):
        if given is not None and given.rstrip("/") != (there or "").rstrip("/"):
            raise ConfigError(
                f"the store has its {name} at {_shown(there)}, not at {_shown(given)}",
                where=str(folder / _FILE),
                next_step=f"Leave {name} out, or name another folder.",
            )
    return place if tier_size_bytes is None else replace(place, tier_size_bytes=tier_size_bytes)


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
            f"the file with the store's location cannot be read: {error}",
            where=str(folder / _FILE),
            next_step="Restore it, or remove it and open the folder again with the arguments catalog and blobs.",
        ) from error


def write_place(folder: Path, place: StorePlace) -> None:
    """Write the location of a store to its folder, unless the folder holds it all.

    Call it after opening the store, so that a wrong location is never recorded.
    """
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


def _shown(url: str | None) -> str:
    if url is None:
        return "its folder"
    return make_url(url).render_as_string(hide_password=True) if url.startswith("postgresql") else url
