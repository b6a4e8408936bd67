"""Blobs in an object store (S3, GCS, Azure or a folder), behind a bounded tier on the local disk.

The object store has all blobs. The tier, a diskcache as in an embedded store, has those written or read last, because
tensors are mapped from files. Anything in the tier may be lost at any time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import BufferedReader
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError, CorruptCacheError, StoreConnectionError, StoreError, StoreFullError
from kv_memory.store.blobs.local import BlobAudit, DiskBlobs, blob_key, is_blob_key
from kv_memory.store.error_mapping import mapped, no_such_bucket
from kv_memory.store.fs import fsync_folder

_SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "file")


class ObjectBlobs:
    """Blobs as objects named `PREFIX/ab/abcd…`, by their SHA-256.

    Credentials and endpoint come from the environment, as the service's own tools read them (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_KEY`, ...). One request takes
    `KV_MEMORY_BLOBS_TIMEOUT_S` seconds at most, 60 unless set; a failing one is retried for
    `KV_MEMORY_BLOBS_RETRY_S` seconds with growing pauses, 30 unless set.

    Args:
        url: `s3://BUCKET/PREFIX`, `gs://...`, `az://...` or `file:///FOLDER`.
        tier: Local copies of the objects in use.

    Raises:
        ConfigError: The URL has another form, obstore is not installed, or a variable is not a number of seconds.
    """

    def __init__(self, url: str, tier: DiskBlobs) -> None:
        timeout = _seconds("KV_MEMORY_BLOBS_TIMEOUT_S", 60.0)
        retry_timeout = _seconds("KV_MEMORY_BLOBS_RETRY_S", 30.0)
        try:
            import obstore
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise ConfigError(
                "blobs in an object store need obstore, which is not installed",
                where="blobs",
                next_step="Run `pip install 'kv-memory[s3]'`.",
            ) from error
        scheme = url.partition("://")[0]
        if scheme not in _SCHEMES or "://" not in url:
            raise ConfigError(
                f"invalid URL for blobs: {url!r}",
                where="blobs",
                next_step="Write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///FOLDER.",
            )
        self.where = url
        self.tier = tier
        self._obstore: Any = obstore
        self._local = Path(url.removeprefix("file://")) if scheme == "file" else None
        options: dict[str, Any] = {}
        if self._local is None:
            options["client_options"] = {
                "timeout": timeout,
                "connect_timeout": timedelta(seconds=5),
                # Options given here replace those of the environment, this one too.
                "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in {"1", "true"},
            }
            options["retry_config"] = {"max_retries": 5, "retry_timeout": retry_timeout}  # pauses of 0.1 s, doubled
        elif not self._local.is_absolute():
            raise ConfigError(
                "the folder in a file:// URL must be an absolute path", where="blobs", next_step="Write file:///FOLDER."
            )
        with mapped(url):
            if self._local is not None:
                self._local.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._store: Any = from_url(url, **options)

    def warm(self) -> None:
        """Open the tier now instead of at the first use."""
        self.tier.warm()

    def put(self, blobs: Mapping[str, bytes | Path]) -> None:
        """See `DiskBlobs.put`; existing objects are replaced."""
        for key, given in blobs.items():
            data = given if isinstance(given, bytes) else given.read_bytes()
            with mapped(self.where):
                # Overwrites an existing object: it may be damaged, and checking takes as long as writing.
                self._obstore.put(self._store, _name(key), data)
                with suppress(FileNotFoundError):  # deleted meanwhile: no row named it yet, and the caller looks again
                    self._make_durable(key)
            with suppress(StoreError):  # the tier is only for speed; the blob is already safe
                self.tier.put({key: data}, replace=True)

    def open(self, key: str, *, fresh: bool = False) -> BufferedReader | None:
        """See `DiskBlobs.open`; a blob that is not in the tier is downloaded."""
        if not is_blob_key(key):
            return None  # such a name could be of an object that is not ours
        if fresh:
            self.tier.delete(key)
        with suppress(CorruptCacheError):  # a tampered row of the tier: fetched again below
            if (file := self.tier.open(key)) is not None:
                return file
        data = self._fetch(key)
        if data is None:
            return None
        self.tier.put({key: data}, replace=True)
        file = self.tier.open(key)
        if file is None:
            raise StoreFullError(
                f"the local tier holds {self.tier.size_limit:,} bytes, which is too small for a blob of {len(data):,}",
                where=self.tier.where,
                next_step="Open the store with a larger tier_size_bytes.",
            )
        return file

    def has(self, key: str) -> bool:
        """Whether the object exists; its bytes are not checked."""
        return self._size_bytes(key) is not None

    def delete(self, key: str) -> int:
        """See `DiskBlobs.delete`."""
        self.tier.delete(key)
        size_bytes = self._size_bytes(key)
        if size_bytes is not None:
            with mapped(self.where), suppress(FileNotFoundError):
                self._obstore.delete(self._store, _name(key))
        return size_bytes or 0

    def audit(self, *, min_age_s: float, repair: bool = False) -> BlobAudit:
        """See `DiskBlobs.audit`; objects that are not blobs are strays, and so are those of the tier."""
        tier = self.tier.audit(min_age_s=min_age_s, repair=repair)
        latest = datetime.now(UTC) - timedelta(seconds=min_age_s)
        keys: set[str] = set()
        young: set[str] = set()
        strays, freed_bytes = tier.strays, tier.freed_bytes
        with mapped(self.where):
            for chunk in self._obstore.list(self._store, chunk_size=1000):
                for entry in chunk:
                    key = entry["path"].rpartition("/")[2]
                    if is_blob_key(key) and entry["path"] == _name(key):
                        keys.add(key)
                        if entry["last_modified"] > latest:
                            young.add(key)
                        continue
                    strays.append(entry["path"])
                    if repair:
                        self._obstore.delete(self._store, entry["path"])
                        freed_bytes += entry["size"]
        return BlobAudit(keys=keys, young=young, strays=strays, freed_bytes=freed_bytes)

    def close(self) -> None:
        """Close the tier."""
        self.tier.close()

    def _size_bytes(self, key: str) -> int | None:
        """Size of the object; None if it does not exist."""
        if not is_blob_key(key):
            return None
        with mapped(self.where):
            try:
                size: int = self._obstore.head(self._store, _name(key))["size"]
            except FileNotFoundError:
                return None
            return size

    def _fetch(self, key: str) -> bytes | None:
        """Fetch a blob; wrong bytes are returned only if the object itself is damaged.

        `BlobReferences` quarantines a damaged blob and deletes it, so a faulty connection must not be believed.

        Raises:
            StoreConnectionError: Two answers are wrong, and differ.
        """
        wrong: bytes | None = None
        for _ in range(2):
            with mapped(self.where):
                try:
                    data = bytes(self._obstore.get(self._store, _name(key)).bytes())
                except FileNotFoundError as error:
                    if no_such_bucket(error):
                        raise
                    return None
            if blob_key(data) == key or (data == wrong and self._size_bytes(key) == len(data)):
                return data
            wrong = data
        raise StoreConnectionError(
            "the object store returned different bytes on each read",
            where=f"{self.where}, blob {key}",
            next_step="Check the network and any proxy on the way, then try again; the stored data is unchanged.",
        )

    def _make_durable(self, key: str) -> None:
        # Services answer once the object is durable; files in a folder must be synced.
        if self._local is None:
            return
        file = self._local / _name(key)
        os.chmod(file, 0o600)
        os.chmod(file.parent, 0o700)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        fsync_folder(str(file.parent))
        fsync_folder(str(self._local))


def _seconds(variable: str, default: float) -> timedelta:
    text = os.environ.get(variable, "").strip()
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{variable} must be a number of seconds above 0, got {text!r}", where=variable)
    return timedelta(seconds=seconds)


def _name(key: str) -> str:
    return f"{key[:2]}/{key}"
