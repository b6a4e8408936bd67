"""What the scenarios put into a store. Each cache follows from its text, so that whoever reads one can judge it."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kv_memory.cache.distilled import DistilledCache
from kv_memory.store import DocumentRecord, Store
from tests import services
from tests.store.store_samples import FINGERPRINT, document, equal, make_cache, sha

__all__ = [
    "FINGERPRINT",
    "PAIRS",
    "RATIO",
    "cache_of",
    "cache_of_hash",
    "document",
    "equal",
    "forked",
    "place",
    "prefix_of",
    "prefix_version",
    "read",
    "sha",
    "texts_of",
    "version_of",
    "versioned",
]

PAIRS = ("sqlite-disk", "postgres-s3", "sqlite-s3", "postgres-disk")
RATIO = 0.25
_numbers = itertools.count()


def place(pair: str, *, postgres: str | None) -> dict[str, Any]:
    """Arguments of `Store.open` for a new store of this kind; S3 is that of the environment."""
    catalog, _, blobs = pair.partition("-")
    name = f"x{time.time_ns():x}{next(_numbers)}"
    given: dict[str, Any] = {}
    if catalog == "postgres":
        assert postgres is not None
        given["catalog"] = f"{postgres}{'&' if '?' in postgres else '?'}schema={name}"
    if blobs == "s3":
        given["blobs"] = f"s3://{services.BUCKET}/{name}"
    return given


def cache_of_hash(text_sha256: str) -> DistilledCache:
    return make_cache(int(text_sha256[:8], 16), keep_ratio=RATIO)


def cache_of(text: str) -> DistilledCache:
    return cache_of_hash(sha(text))


def read(store: Store, text_sha256: str) -> DistilledCache:
    """The cache of a text.

    Raises:
        AssertionError: It is not the one that was put.
    """
    found = store.get(text_sha256, FINGERPRINT, RATIO)
    assert equal(found, cache_of_hash(text_sha256)), f"the cache of {text_sha256} is not the one that was put"
    return found


# A document has versions, counted up; its texts say which.


def texts_of(id: str, version: int, n: int = 2) -> list[str]:
    return [f"{id} version {version} part {part}" for part in range(n)]


def versioned(id: str, version: int, *extra: str, n: int = 2) -> DocumentRecord:
    return document(id, *texts_of(id, version, n), *extra, metadata={"version": version})


def version_of(record: DocumentRecord, n: int = 2) -> int:
    """Which version of a document was read.

    Raises:
        AssertionError: It is half of one and half of another.
    """
    version: int = record.metadata["version"]
    found = [passage.text_sha256 for passage in record.passages][:n]
    assert found == [sha(text) for text in texts_of(record.id, version, n)], f"{record} is half written"
    return version


def prefix_of(key: str, version: int) -> bytes:
    return f"{key}:{version};".encode() * 200


def prefix_version(key: str, path: Path) -> int:
    data = path.read_bytes()
    version = int(data[: data.index(b";")].partition(b":")[2])
    assert data == prefix_of(key, version), f"prefix {key} is half written"
    return version


def forked(work: Callable[[], Any], result: Path) -> int:
    """Run in a process of its own; what it returns is written to the file as JSON. Returns its process id."""
    import json
    import os
    import traceback

    child = os.fork()
    if child:
        return child
    code = 1
    try:
        result.write_text(json.dumps(work()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
