"""Processes killed at random moments while they put, replace, delete, evict and collect; and what is left each time."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kv_memory.errors import CacheNotFoundError, CorruptCacheError, DocumentNotFoundError
from kv_memory.store import Limits, Store, maintenance
from tests.stress.samples import cache_of, forked, prefix_of, prefix_version, read, sha, version_of, versioned

WORKERS = 2  # at once, each with documents of its own; both are killed
DOCUMENTS = 6  # of each
SHARED = [f"shared {number}" for number in range(4)]
# How often each is done: a put or a replacement is several steps, and so takes longer than the others.
WEIGHTS = {"put": 4, "delete": 4, "prefix": 3, "evict": 4, "gc": 3}


class Journal:
    """What a process was about to do and what it has done, in a file that outlives it."""

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, state: str, kind: str, name: str = "", version: int | None = None) -> None:
        os.write(self._fd, (json.dumps([state, kind, name, version]) + "\n").encode())

    @staticmethod
    def read(file: Path) -> list[list[Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def work(folder: Path, worker: int, journal: Path, seed: int, known: dict[str, int]) -> None:
    """Change the store until killed. `known` are this worker's documents and prefix, by name, with their versions."""
    rng = random.Random(seed)
    log = Journal(journal)
    with Store.open(folder, create=False) as store, store.in_collection("small") as small:
        version = 1 + max(known.values(), default=0)
        log.write("ready", "")
        while True:
            version += 1
            kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            name = f"{worker}-{rng.randrange(DOCUMENTS)}"
            if kind == "delete" and name not in known:
                kind = "put"
            if kind == "put":
                log.write("begin", "replace" if name in known else "put", name, version)
                record = versioned(name, version, rng.choice(SHARED))
                for passage in record.passages:
                    assert passage.text is not None
                    store.put(passage.text_sha256, cache_of(passage.text))
                store.put_document(record)
                known[name] = version
            elif kind == "delete":
                log.write("begin", kind, name, None)
                store.delete_document(name)
                del known[name]
            elif kind == "prefix":
                name = f"prefix {worker}"
                log.write("begin", kind, name, version)
                store.put_prefix(name, prefix_of(name, version))
            elif kind == "evict":
                log.write("begin", kind)
                text = f"small {worker} {version}"
                small.put(sha(text), cache_of(text))
            else:
                log.write("begin", kind)
                small.gc()
            log.write("done", kind, name if kind in {"put", "delete", "prefix"} else "", known.get(name, version))


class Fates:
    """What the workers have said of their documents and prefixes: what is there, and what may be instead."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.maybe: dict[str, int | None] = {}

    def hear(self, lines: list[list[Any]]) -> str | None:
        """Take a killed worker's journal; returns what it was about, None if it had not begun."""
        under_way: str | None = None
        for state, kind, name, version in lines:
            if state == "begin":
                under_way = kind
                if name:
                    self.maybe[name] = version
            elif state == "done":
                under_way = "between"
                if name in self.maybe:
                    self.settle(name, self.maybe.pop(name))
        return under_way

    def settle(self, name: str, version: int | None) -> None:
        if version is None:
            self.known.pop(name, None)
        else:
            self.known[name] = version

    def possible(self, name: str) -> set[int | None]:
        return {self.known.get(name), self.maybe.get(name, self.known.get(name))}

    def names(self) -> list[str]:
        return sorted(self.known.keys() | self.maybe.keys())


def examine(folder: Path, fates: Fates) -> dict[str, Any]:
    """Open a store whose users were killed, check it, read all of it, collect; count what is wrong."""
    begun = time.perf_counter()
    maintenance.GRACE_S = -1.0  # nobody else uses the store, so what has no row is left over
    found: dict[str, Any] = {"corrupt_reads": 0, "dangling_rows": 0, "lost_documents": 0, "wrong": [], "states": {}}
    with Store.open(folder, create=False) as store:
        store.documents()
        found["open_s"] = time.perf_counter() - begun
        report = store.check()
        found |= {"orphans": len(report.orphans), "strays": len(report.strays)}
        found["corrupt_reads"] += len(report.damaged) + len(report.misfiled)
        found["dangling_rows"] += len(report.missing)
        for name in fates.names():
            try:
                version = _read_prefix(store, name) if name.startswith("prefix") else _read_document(store, name)
            except (AssertionError, CorruptCacheError) as error:
                found["corrupt_reads"] += 1
                found["wrong"].append(f"{name}: {error}")
                continue
            except CacheNotFoundError as error:  # the document is there, without its caches
                found["lost_documents"] += 1
                found["wrong"].append(f"{name}: {error}")
                continue
            found["states"][name] = version
            if version not in fates.possible(name):
                found["lost_documents"] += 1
                found["wrong"].append(f"{name} is {version}, not one of {fates.possible(name)}")
        with store.in_collection("small") as small:
            for each in (store, small):
                for info in each.caches():
                    try:
                        read(each, info.text_sha256)
                    except (AssertionError, CorruptCacheError) as error:
                        found["corrupt_reads"] += 1
                        found["wrong"].append(f"{info.text_sha256}: {error}")
            gone = [store.gc(), small.gc()]
        found["dangling_rows"] += sum(report.n_dangling_rows for report in gone)
        found["removed"] = sum(report.n_orphan_blobs + report.n_strays for report in gone)
        after = store.check()
        found["left"] = len(after.orphans) + len(after.strays) + len(after.unreferenced)
        if not after.ok:
            found["wrong"].append(f"after gc: {after}")
    return found


def _read_document(store: Store, name: str) -> int | None:
    try:
        record = store.document(name)
    except DocumentNotFoundError:
        return None
    version = version_of(record)
    for passage in record.passages[:2]:  # the last is shared: another document's deletion may have retired its cache
        read(store, passage.text_sha256)
    return version


def _read_prefix(store: Store, name: str) -> int | None:
    path = store.get_prefix(name)
    return None if path is None else prefix_version(name, path)


def kill_rounds(
    folder: Path,
    arguments: dict[str, Any],
    *,
    kills: int,
    seed: int,
    scratch: Path,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Kill so many processes on a new store of these arguments. Forks: to be called in a process with one thread."""
    rng = random.Random(seed)

    def prepare() -> None:
        with Store.open(folder, **arguments) as store, store.in_collection("small") as small:
            store.put_document(versioned("0-0", 1))
            for text in versioned("0-0", 1).passages:
                store.put(text.text_sha256, cache_of(text.text or ""))
            size = small.put(sha("small"), cache_of("small")).size_bytes
            small.set_limits(Limits(max_size_bytes=4 * size))

    fates = Fates()
    fates.known["0-0"] = 1
    total: Counter[str] = Counter()
    under_way: Counter[str] = Counter()
    open_s: list[float] = []
    wrong: list[str] = []
    assert _wait(forked(prepare, scratch / "prepared")) == 0, "the store could not be created"
    n_round = 0
    while total["kills"] < kills:
        n_round += 1
        journals = [scratch / f"journal {n_round} {worker}" for worker in range(WORKERS)]
        children = []
        for worker, journal in enumerate(journals):
            own = {name: v for name, v in fates.known.items() if name.startswith(f"{worker}-")}
            job = (folder, worker, journal, rng.randrange(2**32), own)
            children.append(forked(lambda job=job: work(*job), scratch / "never"))  # type: ignore[misc]
        if rng.random() < 0.9:  # else while it is opened
            deadline = time.monotonic() + 20
            while not all(journal.exists() and journal.stat().st_size for journal in journals):
                assert time.monotonic() < deadline, "the workers did not start"
                time.sleep(0.002)
        for child in rng.sample(children, WORKERS):
            time.sleep(rng.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
        for child, journal in zip(children, journals, strict=True):
            assert _wait(child) == -signal.SIGKILL, "a worker failed before it was killed"
            total["kills"] += 1
            under_way[fates.hear(Journal.read(journal)) or "opening"] += 1
            journal.unlink(missing_ok=True)
        assert _wait(forked(lambda: examine(folder, fates), scratch / "found")) == 0, "the store cannot be used"
        found = json.loads((scratch / "found").read_text())
        for name, version in found["states"].items():
            fates.settle(name, version)
        fates.maybe.clear()
        open_s.append(found["open_s"])
        wrong += found["wrong"]
        for name in ("corrupt_reads", "dangling_rows", "lost_documents", "orphans", "strays", "removed", "left"):
            total[name] += found[name]
        progress(total["kills"])
    return {**total, "under_way": dict(under_way), "slowest_open_s": max(open_s), "wrong": wrong[:20]}


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
