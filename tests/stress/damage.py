"""Ways to damage or tamper with a store, and whether what was damaged is refused, put aside and made again.

Every payload that could run is one that would leave a marker file.
"""

from __future__ import annotations

import os
import pickle
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import text as sql

from kv_memory.errors import CacheNotFoundError, CorruptCacheError
from kv_memory.store import CacheInfo, Store, maintenance
from tests.store.store_samples import blob_file
from tests.stress.samples import FINGERPRINT, RATIO, cache_of, cache_of_hash, document, equal, read, sha

__all__ = ["FILES", "HEALED", "REFUSED", "ROWS", "Bomb", "Scene", "damages"]

N_ENTRIES = 8


class Bomb:
    """What it is pickled to makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.marker,))


@dataclass(frozen=True)
class Scene:
    """What a damage is done to.

    Attributes:
        store: An open store.
        rng: What chooses bits and lengths.
        victim: The cache that is damaged.
        other: Another one, which must not suffer.
        marker: The file that nothing may make.
        outside: A folder beside the store with a sound copy of the victim's blob, `secret.val`.
    """

    store: Store
    rng: random.Random
    victim: CacheInfo
    other: CacheInfo
    marker: Path
    outside: Path

    @property
    def file(self) -> Path:
        return blob_file(self.store, self.victim.blob_key)

    def row(self, assignment: str, *values: object) -> None:
        """Change the victim's row of diskcache."""
        with closing(sqlite3.connect(self.store.path / "blobs" / "cache.db", timeout=30)) as connection, connection:
            statement = f"UPDATE Cache SET {assignment} WHERE key = ?"
            assert connection.execute(statement, (*values, self.victim.blob_key)).rowcount == 1

    def catalog(self, assignment: str, **values: object) -> None:
        """Change the victim's row of the catalog."""
        with self.store.catalog.write() as session:
            statement = f"UPDATE distilled_cache SET {assignment} WHERE blob_key = :key"
            done: Any = session.execute(sql(statement), {**values, "key": self.victim.blob_key})
            assert done.rowcount == 1

    @property
    def name(self) -> str:
        """Of the victim's object."""
        return f"{self.victim.blob_key[:2]}/{self.victim.blob_key}"

    def put_object(self, data: bytes, *, in_tier: bool = False) -> None:
        """Put other bytes in the place of the victim's object, and take the copy in the tier away."""
        blobs: Any = self.store.references.blobs
        blobs._obstore.put(blobs._store, self.name, data)
        if not in_tier:
            blobs.tier.delete(self.victim.blob_key)

    def object(self, info: CacheInfo) -> bytes:
        blobs: Any = self.store.references.blobs
        return bytes(blobs._obstore.get(blobs._store, f"{info.blob_key[:2]}/{info.blob_key}").bytes())


# -- of bytes


def flipped(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged) if damaged != data else data[:-1]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def padded(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 600))


def zeroed(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) - 600)
    return data[:start] + bytes(512) + data[start + 512 :]


BYTES: list[Callable[[bytes, random.Random], bytes]] = [flipped, truncated, padded, zeroed]


def damaged_file(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Scene], None]:
    def damage(scene: Scene) -> None:
        scene.file.write_bytes(change(scene.file.read_bytes(), scene.rng))

    damage.__name__ = f"file_{change.__name__}"
    return damage


def file_removed(scene: Scene) -> None:
    scene.file.unlink()


def file_swapped(scene: Scene) -> None:
    """The file of another cache, sound in itself, of the same length."""
    scene.file.write_bytes(blob_file(scene.store, scene.other.blob_key).read_bytes())


def file_renamed_over(scene: Scene) -> None:
    """As an editor or a backup writes: another inode, and times that may be old."""
    copy = scene.outside / "copy"
    copy.write_bytes(flipped(scene.file.read_bytes(), scene.rng))
    status = scene.file.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(copy, scene.file)


def file_pickled(scene: Scene) -> None:
    scene.file.write_bytes(pickle.dumps(Bomb(scene.marker)))


def file_linked_away(scene: Scene) -> None:
    file = scene.file
    file.unlink()
    file.symlink_to(scene.outside / "secret.val")


def file_made_a_folder(scene: Scene) -> None:
    file = scene.file
    file.unlink()
    file.mkdir()


# -- of diskcache's rows


def row_pickled(scene: Scene) -> None:
    scene.row("mode = 4, filename = NULL, value = ?", pickle.dumps(Bomb(scene.marker)))


def row_pickled_file(scene: Scene) -> None:
    scene.file.write_bytes(pickle.dumps(Bomb(scene.marker)))
    scene.row("mode = 4")


def row_pickled_key(scene: Scene) -> None:
    scene.row("key = ?, raw = 0", pickle.dumps(Bomb(scene.marker)))


def row_inline(scene: Scene) -> None:
    scene.row("mode = 1, filename = NULL, value = ?", scene.file.read_bytes())


def row_of_text(scene: Scene) -> None:
    scene.row("mode = 3")


def row_dotted(scene: Scene) -> None:
    scene.row("filename = ?", os.path.relpath(scene.outside / "secret.val", scene.store.path / "blobs"))


def row_absolute(scene: Scene) -> None:
    scene.row("filename = ?", str(scene.outside / "secret.val"))


def row_through_a_link(scene: Scene) -> None:
    with suppress(FileExistsError):
        (scene.store.path / "blobs" / "away").symlink_to(scene.outside, target_is_directory=True)
    scene.row("filename = ?", "away/secret.val")


def row_of_another(scene: Scene) -> None:
    root = scene.store.path / "blobs"
    scene.row("filename = ?", str(blob_file(scene.store, scene.other.blob_key).relative_to(root)))


def row_of_no_name(scene: Scene) -> None:
    scene.row("filename = ?", scene.rng.choice([b"\x80\x04", 7, "", ".", "\0.val", "cache.db", None]))


def row_removed(scene: Scene) -> None:
    scene.row("key = ?", f"somebody else {scene.rng.random()}")


# -- of the catalog's rows


def catalog_swapped(scene: Scene) -> None:
    """The hard one: the row names the sound blob of another text."""
    scene.catalog("blob_key = :other, size_bytes = :size", other=scene.other.blob_key, size=scene.other.size_bytes)


def catalog_key_elsewhere(scene: Scene) -> None:
    keys = ["../../secret", "../outside/secret.val", str(scene.outside / "secret.val")[-64:], "", "A" * 64, "0" * 64]
    scene.catalog("blob_key = :other", other=scene.rng.choice(keys))


def catalog_size(scene: Scene) -> None:
    scene.catalog("size_bytes = :size", size=scene.rng.choice([0, -1, 1, scene.victim.size_bytes + 1, 2**60]))


# -- of objects


def damaged_object(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Scene], None]:
    def damage(scene: Scene) -> None:
        scene.put_object(change(scene.object(scene.victim), scene.rng))

    damage.__name__ = f"object_{change.__name__}"
    return damage


def object_swapped(scene: Scene) -> None:
    scene.put_object(scene.object(scene.other))


def object_pickled(scene: Scene) -> None:
    scene.put_object(pickle.dumps(Bomb(scene.marker)))


def object_and_tier(scene: Scene) -> None:
    scene.put_object(flipped(scene.object(scene.victim), scene.rng), in_tier=True)
    scene.file.write_bytes(flipped(scene.file.read_bytes(), scene.rng))


CATALOG: list[Callable[[Scene], None]] = [catalog_swapped, catalog_key_elsewhere, catalog_size]
FILES: list[Callable[[Scene], None]] = [
    *(damaged_file(change) for change in (flipped, *BYTES)),
    file_removed,
    file_swapped,
    file_renamed_over,
    file_pickled,
    file_linked_away,
    file_made_a_folder,
]
ROWS: list[Callable[[Scene], None]] = [
    row_pickled,
    row_pickled_file,
    row_pickled_key,
    row_inline,
    row_of_text,
    row_dotted,
    row_absolute,
    row_through_a_link,
    row_of_another,
    row_of_no_name,
    row_removed,
]
OBJECTS: list[Callable[[Scene], None]] = [
    *(damaged_object(change) for change in (flipped, *BYTES)),
    object_swapped,
    object_pickled,
    object_and_tier,
]
# Where wrong bytes lie under a right name, they are kept for whoever wants to look; elsewhere there is nothing to keep.
PUT_ASIDE = [*FILES[: 1 + len(BYTES)], file_swapped, file_renamed_over, file_pickled, *OBJECTS]
# In front of an object store the files and diskcache's rows are copies: damage there heals without anybody's notice.
REFUSED = {"disk": [*FILES, *ROWS, *CATALOG, catalog_swapped, catalog_swapped], "s3": [*OBJECTS, *CATALOG]}
HEALED: dict[str, list[Callable[[Scene], None]]] = {"disk": [], "s3": [*FILES, *ROWS]}


def damages(
    store: Store,
    *,
    n: int,
    seed: int,
    scratch: Path,
    progress: Callable[[int], None] = lambda n: None,
    kinds: list[Callable[[Scene], None]] | None = None,
) -> dict[str, Any]:
    """Damage a new store so many times; counts what was not as it must be."""
    maintenance.GRACE_S = -1.0  # nobody else uses the store, so what has no row is left over
    rng = random.Random(seed)
    blobs = "disk" if isinstance(store.blobs_url, str) and "://" not in store.blobs_url else "s3"
    every = kinds if kinds is not None else [*REFUSED[blobs], *HEALED[blobs]]
    texts = [f"entry {number}" for number in range(N_ENTRIES)]
    for text in texts:
        store.put(sha(text), cache_of(text))
    outside = scratch / "outside"
    outside.mkdir()
    total: Counter[str] = Counter()
    per_kind: Counter[str] = Counter()
    wrong: list[str] = []
    queue: list[Callable[[Scene], None]] = []
    while total["flips"] < n:
        queue = queue or rng.sample(every, len(every))  # each kind as often as any other
        damage = queue.pop()
        infos = {info.text_sha256: info for info in store.caches()}
        victim, other = (infos[sha(text)] for text in rng.sample(texts, 2))
        marker = scratch / f"marker {total['flips']}"
        scene = Scene(store, rng, victim, other, marker, outside)
        (outside / "secret.val").write_bytes(scene.file.read_bytes() if blobs == "disk" else scene.object(victim))
        secret = (outside / "secret.val").read_bytes()
        if rng.random() < 0.5:
            read(store, victim.text_sha256)  # hashed in this process
        if blobs == "s3":
            read(store, victim.text_sha256)  # a copy in the tier
        n_quarantined = store.stats().n_quarantined
        damage(scene)
        total["flips"] += 1
        per_kind[damage.__name__] += 1
        problems = _judge(scene, healed=damage in HEALED[blobs], by_check=rng.random() < 0.3)
        if damage in PUT_ASIDE and damage not in HEALED[blobs]:
            total["quarantined"] += 1
            # Under the name of the blob: the same one damaged twice is there once.
            aside = store.path / "quarantine" / f"{victim.blob_key}.safetensors"
            if not aside.exists() or store.stats().n_quarantined < n_quarantined:
                problems.append("not in quarantine")
        if (outside / "secret.val").read_bytes() != secret:
            problems.append("a file outside was changed")
        store.put(victim.text_sha256, cache_of_hash(victim.text_sha256))
        for text in texts:
            try:
                read(store, sha(text))
            except (AssertionError, CorruptCacheError, CacheNotFoundError) as error:
                # Where two rows of diskcache name one file, it goes with the first; the other is made again.
                if damage is not row_of_another or sha(text) != other.text_sha256:
                    problems.append(f"{text} afterwards: {error}")
                store.put(sha(text), cache_of(text))
        if rng.random() < 0.2:
            store.put_document(document("all", *texts))
            store.gc()
            if not (report := store.check()).ok:
                problems.append(f"after gc: {report}")
        if marker.exists():
            total["executed"] += 1
            problems.append("the payload ran")
        if problems:
            total["corrupt_reads"] += 1
            wrong.append(f"{damage.__name__}: {'; '.join(problems)}")
        progress(total["flips"])
    return {"corrupt_reads": 0, "executed": 0, **total, "per_kind": dict(per_kind), "wrong": wrong[:20]}


def _judge(scene: Scene, *, healed: bool, by_check: bool) -> list[str]:
    """Read what was damaged; returns what is not as it must be."""
    store, text = scene.store, scene.victim.text_sha256
    if by_check:  # the first to come across it is not always a reader
        store.check()
        refused = not store.has(text, FINGERPRINT, RATIO)
        if healed:
            return [] if not refused else ["check blamed the object for the damage of a copy"]
        if refused:
            return []
        # A row without its file is left to `gc`, which may be told not to run; a reader is refused all the same.
    try:
        cache = store.get(text, FINGERPRINT, RATIO)
    except CorruptCacheError:
        problems = [] if not healed else ["refused, although the object is intact"]
        if store.has(text, FINGERPRINT, RATIO):
            problems.append("refused, but still listed")
        return problems
    except CacheNotFoundError:
        return ["lost without an error about damage"]
    if not equal(cache, cache_of_hash(text)):
        return ["DECODED: the cache of another text was returned"]
    return [] if healed else ["damage was not detected"]
