"""The store against plain files: writes, cold reads, lookups among many entries, opening.

    python benchmarks/store.py                      # a table
    python benchmarks/store.py --json               # one JSON object
    python benchmarks/store.py --goals --entries 1000   # the ratios against their goals, kept in results/
    python benchmarks/store.py --catalog postgresql+psycopg://USER@HOST/DB --blobs s3://BUCKET/PREFIX

Caches have the shape of smollm2: 30 layers, 3 heads, 64 entries each of 64 numbers in bfloat16, 1.5 MB. Each is written
twice, one right after the other, in an order that alternates: by `Store.put`, and as a plain safetensors file with the
same fsyncs (the file, its folder, and two records appended to logs in place of the store's two databases). Reads are
cold: another Store, and the files dropped from the page cache where the system allows it (Linux); every byte of the
tensors is touched. The store also computes, or verifies, a SHA-256, which on a fast disk takes as long as reading;
`_hashed` compares with plain files that are hashed too. Ratios are of medians, and above 1 where the store is faster.
Measure them on an idle machine; the seconds depend on the machine.

    write_ratio, read_ratio   plain file's time / the store's; _hashed: with a SHA-256
    n_entries                 tiny caches in a separate store
    lookup_p50_ms, _p99_ms    `Store.has` of random ones
    get_p99_ms                `Store.get` of random ones
    open_s                    `Store.open`, the slowest of ten
    peak_rss_mb               of this process, at the end
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from results import keep_rows

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import FORMATS, Fingerprint
from kv_memory.store import Store

HEADS = (30, 3)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", type=int, default=60, help="full-size caches, for writes and reads (default: 60)")
    parser.add_argument("--entries", type=int, default=60_000, help="tiny caches, for lookups (default: 60,000)")
    parser.add_argument("--catalog", help="URL of a PostgreSQL database (default: SQLite)")
    parser.add_argument("--blobs", help="URL of an object store (default: files)")
    parser.add_argument("--folder", type=Path, help="folder to write to (default: a temporary folder)")
    parser.add_argument("--goals", action="store_true", help="ratios against their goals, one JSON object a row")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    place = {"catalog": args.catalog, "blobs": args.blobs}
    with tempfile.TemporaryDirectory(prefix="kv-memory-bench-", dir=args.folder) as name:
        folder = Path(name)
        found = {**write_and_read(folder, args.caches, place), **look_up(folder, args.entries, place)}
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.goals:
        put, get = found["write_ratio_hashed"], found["read_ratio_hashed"]
        rows = [("store: plain write with the same fsyncs and SHA-256 / put", put, ">= 0.8")]
        rows.append(("store: cold plain read with SHA-256 / get", get, ">= 0.9"))
        keep_rows("store", rows, **found)
        return
    if args.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:24s} {value:,.4g}" if isinstance(value, float) else f"{key:24s} {value}")


def fingerprint(head_dim: int) -> Fingerprint:
    """One like those of smollm2."""
    digest = "0" * 64
    return Fingerprint(
        format_version=FORMATS[0],
        architecture="llama",
        weights=digest,
        tokenizer=digest,
        prompt=digest,
        prefix=digest,
        method="adapter",
        adapter=digest,
        eta=None,
        rope=digest,
        dtype="bfloat16",
        num_layers=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=head_dim,
    )


def cache(seed: int, *, n_kept: int, head_dim: int) -> DistilledCache:
    """One of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*HEADS, n_kept, head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    return DistilledCache(
        keys=keys,
        values=values,
        positions=torch.arange(n_kept).expand(*HEADS, n_kept).contiguous(),
        n_tokens=4 * n_kept,
        keep_ratio=0.25,
        fingerprint=fingerprint(head_dim),
    )


def sha(number: int) -> str:
    """Of the text of the cache of this number."""
    return hashlib.sha256(f"text {number}".encode()).hexdigest()


def write_and_read(folder: Path, n_caches: int, place: dict[str, Any]) -> dict[str, float]:
    """Caches of full size, through the store and as plain files."""
    plain = folder / "plain"
    plain.mkdir()
    logs = [open(folder / f"log{number}", "ab") for number in range(2)]  # noqa: SIM115  open as long as the store is
    times: dict[str, list[float]] = {
        name: [] for name in ("put", "plain", "plain_hashed", "get", "load", "load_hashed")
    }
    with Store.open(folder / "store", **place) as store:
        store.put(sha(-1), cache(0, n_kept=1, head_dim=8))  # opens the databases

        def put(number: int, made: DistilledCache) -> None:
            store.put(sha(number), made)

        def plain_file(number: int, made: DistilledCache, *, hashed: bool = False) -> None:
            write_plain(plain / f"{number}.safetensors", made, hashed=hashed)
            for log in logs:
                log.write(b"x" * 400)
                log.flush()
                os.fsync(log.fileno())

        def plain_hashed(number: int, made: DistilledCache) -> None:
            plain_file(-1 - number, made, hashed=True)

        ways: list[tuple[str, Callable[[int, DistilledCache], None]]] = [
            ("put", put),
            ("plain", plain_file),
            ("plain_hashed", plain_hashed),
        ]
        for number in range(n_caches):
            made = cache(number, n_kept=64, head_dim=64)
            random.Random(number).shuffle(ways)
            for name, way in ways:
                times[name].append(timed(way, number, made))
        n_bytes = store.caches()[-1].size_bytes
    with Store.open(folder / "store", create=False) as store:
        store.warm()
        for path in folder.rglob("*"):
            drop(path)

        def get(number: int) -> None:
            touch(store.get(sha(number), fingerprint(64), 0.25))

        def load(number: int) -> None:
            tensors = safetensors.torch.load_file(plain / f"{number}.safetensors")
            for tensor in tensors.values():
                tensor.sum()

        def load_hashed(number: int) -> None:
            with open(plain / f"{-1 - number}.safetensors", "rb") as file:
                hashlib.file_digest(file, "sha256")
            load(-1 - number)

        readers = [("get", get), ("load", load), ("load_hashed", load_hashed)]
        for number in range(n_caches):
            for name, read in random.Random(number).sample(readers, len(readers)):
                times[name].append(timed(read, number))
    for log in logs:
        log.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "cache_bytes": n_bytes,
        "write_ratio": medians["plain"] / medians["put"],
        "write_ratio_hashed": medians["plain_hashed"] / medians["put"],
        "read_ratio": medians["load"] / medians["get"],
        "read_ratio_hashed": medians["load_hashed"] / medians["get"],
        "put_ms": 1e3 * medians["put"],
        "get_ms": 1e3 * medians["get"],
    }


def write_plain(path: Path, made: DistilledCache, *, hashed: bool) -> None:
    """A safetensors file that survives a power cut."""
    data = safetensors.torch.save({"keys": made.keys, "values": made.values, "positions": made.positions.short()})
    if hashed:
        hashlib.sha256(data)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def touch(made: DistilledCache) -> None:
    """Read every number."""
    for tensor in (made.keys, made.values, made.positions):
        tensor.sum()


def drop(path: Path) -> None:
    """Drop a file from the page cache, so that reading it reads the disk."""
    if hasattr(os, "posix_fadvise") and path.is_file():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def look_up(folder: Path, n_entries: int, place: dict[str, Any]) -> dict[str, float]:
    """Lookups among many tiny caches, all of them really put."""
    where = folder / "many"
    place = {name: None if url is None else _beside(url, name) for name, url in place.items()}
    begun = time.monotonic()
    with Store.open(where, **place) as store:
        for number in range(n_entries):
            store.put(sha(number), cache(number, n_kept=1, head_dim=2))
            if sys.stderr.isatty() and number % 1000 == 0:
                print(f"\r{number:,} of {n_entries:,} entries", end="", file=sys.stderr)
    filled_s = time.monotonic() - begun
    opened = [timed(lambda: Store.open(where, create=False).close()) for _ in range(10)]
    numbers = random.Random(0).choices(range(n_entries), k=2000)
    print_ = fingerprint(2)
    with Store.open(where, create=False) as store:
        store.warm()
        lookups = [timed(store.has, sha(number), print_, 0.25) for number in numbers]
        gets = [timed(store.get, sha(number), print_, 0.25) for number in numbers[:1000]]
        n_caches = store.stats().n_caches
    assert n_caches == n_entries, n_caches
    return {
        "n_entries": n_entries,
        "put_tiny_ms": 1e3 * filled_s / max(1, n_entries),
        "lookup_p50_ms": 1e3 * statistics.median(lookups),
        "lookup_p99_ms": 1e3 * statistics.quantiles(lookups, n=100)[98],
        "get_p99_ms": 1e3 * statistics.quantiles(gets, n=100)[98],
        "open_s": max(opened),
    }


def _beside(url: str, name: str) -> str:
    if name == "blobs":
        return f"{url.rstrip('/')}-many"
    return f"{url}{'&' if '?' in url else '?'}schema=kv_memory_many"


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
