"""A store with every kind of row, for tests that copy it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import torch
from sqlalchemy import update
from store_samples import OTHER, document, make_cache, sha

from kv_memory.store import CacheInfo, Store, TransferProgress
from kv_memory.store.sql.schema import CacheRow

NOW = datetime(2026, 5, 4, 3, 2, 1, 567, tzinfo=UTC)


def fill(store: Store, n: int = 3) -> None:
    """`n` documents of two passages, one of which they all have; every kind of row and of cache."""
    store.update_settings({"model": "tiny", "keep_ratio": 0.25})
    store.put(sha("shared"), make_cache(99))
    for i in range(n):
        store.put(sha(f"text {i}"), replace(make_cache(i), fidelity=0.1 * i))
        store.put_document(document(f"d{i:03}", f"text {i}", "shared", metadata={"n": i, "ü": [None, "\ud800"]}))
    biased = make_cache(7, keep_ratio=0.5, fingerprint=replace(OTHER, format_version=2))
    biased = replace(biased, bias=torch.ones(biased.keys.shape[:-1], dtype=torch.float16))
    store.put(sha("text 0"), biased, storage="int8")
    store.put_document(document("twin", "twin", source_uri="file:///twin", passage_tokens=64))
    store.put(sha("twin"), make_cache(1))
    store.put(sha("waiting"), make_cache(50))  # belongs to no document, so it stays at home
    store.put_prefix("p", b"prefix")
    with store.catalog.write() as session:
        session.execute(
            update(CacheRow)
            .where(CacheRow.text_sha256 == sha("text 1"))
            .values(pinned=True, created_at=NOW, last_used_at=NOW + timedelta(1), expires_at=NOW + timedelta(10**5))
        )


def contents(store: Store) -> dict[str, Any]:
    """All that travels, without the numbers of the store."""
    wanted = [info for info in store.caches() if store.text(info.text_sha256) is not None]
    prefix = store.get_prefix("p")
    return {
        "settings": store.settings(),
        "documents": [replace(store.document(d.id), updated_at=None) for d in store.documents()],
        "caches": sorted(wanted, key=lambda info: (info.text_sha256, info.fingerprint)),
        "prefix": None if prefix is None else prefix.read_bytes(),
        "blobs": {info.blob_key: blob_bytes(store, info) for info in wanted},
    }


def blob_bytes(store: Store, info: CacheInfo) -> bytes:
    return store.references.verified_path(info.blob_key, info.size_bytes).read_bytes()


class Stop(Exception):  # noqa: N818
    pass


def stop_after(n: int) -> Callable[[TransferProgress], None]:
    seen: list[int] = []

    def told(progress: TransferProgress) -> None:
        seen.append(1)
        if len(seen) == n:
            raise Stop

    return told
