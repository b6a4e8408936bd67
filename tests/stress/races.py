"""Six processes at work on one store at once: what each of them reads is whole, and in the end all is there."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kv_memory.errors import CacheNotFoundError, CorruptCacheError, DocumentNotFoundError, StoreError, StoreFullError
from kv_memory.store import Limits, Store, maintenance
from tests.stress.samples import cache_of, forked, prefix_of, prefix_version, read, sha, version_of, versioned

__all__ = ["ROLES", "race"]

N_DOCUMENTS = 3  # of each writer
N_PASSAGES = 4  # of a document: enough that a half-written one would be seen

Count = Callable[[str], None]


def write(store: Store, me: int, rng: random.Random, count: Count) -> None:
    """Put, replace and delete documents of one's own; their caches are put before them."""
    name = f"{me}-{rng.randrange(N_DOCUMENTS)}"
    if rng.random() < 0.1:
        with suppress(DocumentNotFoundError):
            store.delete_document(name)
        count("delete")
        return
    record = versioned(name, rng.randrange(10**6), n=N_PASSAGES)
    for passage in record.passages:
        store.put(passage.text_sha256, cache_of(passage.text or ""))
    store.put_document(record)
    count("replace")


def look(store: Store, me: int, rng: random.Random, count: Count) -> None:
    """Read somebody's document, whole, and its caches; what was replaced in between is no longer there."""
    name = f"{rng.randrange(2)}-{rng.randrange(N_DOCUMENTS)}"
    try:
        record = store.document(name)
    except DocumentNotFoundError:
        count("read nothing")
        return
    version = version_of(record, n=N_PASSAGES)
    for passage in record.passages:
        try:
            read(store, passage.text_sha256)
        except CacheNotFoundError as error:
            assert version not in _versions_now(store, name), f"{name} exists, but its cache does not: {error}"
            count("read replaced")
            return
    prefix = f"prefix {rng.randrange(2)}"
    path = store.get_prefix(prefix)
    try:
        if path is not None:
            prefix_version(prefix, path)
    except FileNotFoundError:
        count("read replaced")  # between the path and its bytes
    count("read")


def _versions_now(store: Store, name: str) -> list[int]:
    try:
        return [version_of(store.document(name), n=N_PASSAGES)]
    except DocumentNotFoundError:
        return []


def fill(store: Store, me: int, rng: random.Random, count: Count) -> None:
    """Put caches under a budget, so that others go; read them, whoever has put them."""
    with store.in_collection("small") as small:
        text = f"small {rng.randrange(40)}"
        try:
            small.put(sha(text), cache_of(text))
            count("evict")
        except StoreFullError:
            count("refused by the budget")
        try:
            read(small, sha(f"small {rng.randrange(40)}"))
            count("read")
        except CacheNotFoundError:
            count("read nothing")


def keep(store: Store, me: int, rng: random.Random, count: Count) -> None:
    """Check and collect; of what others write at that moment nothing is missing, damaged or removed."""
    with store.in_collection("small") as small:
        small.gc()
        count("gc")
        report = store.check()
        assert not report.missing and not report.damaged and not report.misfiled, report
        count("check")
        prefix = f"prefix {rng.randrange(2)}"
        store.put_prefix(prefix, prefix_of(prefix, rng.randrange(10**6)))
        count("prefix")
        small.set_limits(Limits(max_size_bytes=rng.randint(4, 10) * 2200))
        count("evict")


ROLES = [write, write, look, look, fill, keep]


def race(
    folder: Path,
    arguments: dict[str, Any],
    *,
    seconds: float,
    seed: int,
    scratch: Path,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Let them race for so long on a new store. Forks: to be called in a process with one thread."""

    def prepare() -> None:
        with Store.open(folder, **arguments) as store, store.in_collection("small") as small:
            small.set_limits(Limits(max_size_bytes=6 * 2200))

    assert os.waitstatus_to_exitcode(os.waitpid(forked(prepare, scratch / "prepared"), 0)[1]) == 0
    begin = time.time() + 1
    children = [
        forked(lambda me=me: _run(folder, me, seed + me, begin, begin + seconds), scratch / f"racer {me}")  # type: ignore[misc]
        for me in range(len(ROLES))
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * len(ROLES), f"racers ended with exit statuses {codes}"
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for me in range(len(ROLES)):
        said = json.loads((scratch / f"racer {me}").read_text())
        total.update(said["counts"])
        wrong += said["wrong"]
    assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda: _end(folder), scratch / "end"), 0)[1]) == 0
    end = json.loads((scratch / "end").read_text())
    progress(sum(total.values()))
    return {
        "races": sum(total.values()),
        "corrupt_reads": len(wrong) + end["corrupt_reads"],
        "dangling_rows": end["dangling_rows"],
        "lost_documents": end["lost_documents"],
        "per_kind": dict(total),
        "wrong": [*wrong, *end["wrong"]][:20],
    }


def _run(folder: Path, me: int, seed: int, begin: float, end: float) -> dict[str, Any]:
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    time.sleep(max(0.0, begin - time.time()))
    with Store.open(folder, create=False) as store:
        while time.time() < end and len(wrong) < 5:
            try:
                ROLES[me](store, me, rng, lambda name: counts.update([name]))
            except (AssertionError, CorruptCacheError) as error:
                wrong.append(f"{ROLES[me].__name__}: {error}")
            except StoreError as error:
                if "changed each time" not in error.what:
                    raise
                counts.update(["read replaced"])
    return {"counts": counts, "wrong": wrong}


def _end(folder: Path) -> dict[str, Any]:
    """When all is quiet: every document has its caches, and nothing is missing or left over after collecting."""
    maintenance.GRACE_S = -1.0  # nobody else uses the store, so what has no row is left over
    wrong: list[str] = []
    found = {"corrupt_reads": 0, "dangling_rows": 0, "lost_documents": 0}
    with Store.open(folder, create=False) as store:
        report = store.check()
        found["dangling_rows"] += len(report.missing)
        found["corrupt_reads"] += len(report.damaged) + len(report.misfiled)
        for summary in store.documents():
            record = store.document(summary.id)
            try:
                version_of(record, n=N_PASSAGES)
                for passage in record.passages:
                    read(store, passage.text_sha256)
            except CacheNotFoundError as error:
                found["lost_documents"] += 1
                wrong.append(str(error))
            except (AssertionError, CorruptCacheError) as error:
                found["corrupt_reads"] += 1
                wrong.append(str(error))
        found["dangling_rows"] += store.gc().n_dangling_rows
        after = store.check()
        if not after.ok or after.unreferenced:
            wrong.append(f"after gc: {after}")
            found["corrupt_reads"] += 1
    return {**found, "wrong": wrong}
