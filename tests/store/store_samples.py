"""Small caches and documents, for the tests here and for the scripts they run in processes of their own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.config import StorageName
from kv_memory.store import DocumentRecord, PassageRecord, Store

FINGERPRINT = Fingerprint(
    format_version=1,
    architecture="llama",
    weights="a" * 64,
    tokenizer="b" * 64,
    prompt="c" * 64,
    prefix="d" * 64,
    method="sink_recent",
    adapter="",
    eta=None,
    rope="e" * 64,
    dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
)
OTHER = replace(FINGERPRINT, weights="f" * 64)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_cache(
    seed: int, *, keep_ratio: float = 0.25, fingerprint: Fingerprint = FINGERPRINT, n_kept: int = 8
) -> DistilledCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, n_kept, 4)
    return DistilledCache(
        keys=torch.randn(shape, generator=generator),
        values=torch.randn(shape, generator=generator),
        positions=torch.arange(n_kept),
        n_tokens=4 * n_kept,
        keep_ratio=keep_ratio,
        fingerprint=fingerprint,
    )


def stored_bytes(text: str, cache: DistilledCache, *, storage: StorageName = "auto") -> bytes:
    """The blob of a cache that was put for a text."""
    return replace(cache, text_sha256=sha(text)).to_bytes(storage=storage)


def document(id: str, *texts: str, **fields: object) -> DocumentRecord:
    passages = tuple(PassageRecord(text=text, n_tokens=len(text)) for text in texts)
    record = DocumentRecord(id=id, content_sha256=sha("".join(texts)), passages=passages)
    return replace(record, **fields)  # type: ignore[arg-type]


def equal(a: DistilledCache, b: DistilledCache) -> bool:
    same = torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    return same and torch.equal(a.positions.long(), b.positions.long()) and a.fingerprint == b.fingerprint


def blob_files(store: Store) -> list[Path]:
    return sorted((store.path / "blobs").rglob("*.val"))


def blob_file(store: Store, key: str) -> Path:
    """The file that diskcache keeps for a blob, found without the store's own reading code."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(store.path / "blobs" / "cache.db")) as connection:
        (filename,) = connection.execute("SELECT filename FROM Cache WHERE key = ?", (key,)).fetchone()
    return store.path / "blobs" / str(filename)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes less than so long."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def held(folder: Path, samples: dict[str, bytes]) -> set[str]:
    """Which of the samples stand in a file of the folder, or are its name."""
    found: set[str] = set()
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        data += str(path.relative_to(folder)).encode()
        found |= {name for name, sample in samples.items() if sample in data}
    return found


def samples_of(name: str, blob: bytes, *others: bytes) -> dict[str, bytes]:
    """Pieces of 32 bytes all over a blob's tensors, and whatever else gives a document away."""
    start = 8 + int.from_bytes(blob[:8], "little")  # the header before is the same in all blobs of a model
    places = range(start, len(blob) - 32, max(1, (len(blob) - start) // 40))
    pieces = {f"{name} blob at {i}": blob[i : i + 32] for i in places if len(set(blob[i : i + 32])) > 16}
    assert len(pieces) > 20
    return pieces | {f"{name} {other[:20]!r}": other for other in others}
