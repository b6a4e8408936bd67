"""What int8 saves on disk and costs at loading and in answers, compared with bfloat16, for caches of smollm2.

    python benchmarks/storage.py           # three tables
    python benchmarks/storage.py --json    # one JSON object per line

Sizes are those of caches that the shipped adapter makes from documents of SQuAD dev (`KV_MEMORY_DATA`, see the README),
file headers and positions included. Times are of caches with random numbers, heads of many lengths: a newly opened
store finds the cache, verifies its SHA-256 and reads every key and value; and does so again, when the file needs no
verification. The forms alternate; times are medians. The files are in the operating system's page cache. Differences
are int8 minus bfloat16 in what `kv-memory eval` wrote with and without `--set storage=int8`, question by question, with
95% intervals from a bootstrap over documents, whose questions stay together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Adapter, Compressor
from kv_memory.config import StorageName, ratio_of
from kv_memory.evaluate import Record, TaskSettings
from kv_memory.evaluate.question_records import latest, load_records
from kv_memory.evaluate.tasks import find_task
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import adapter_folder
from kv_memory.store import Store

FORMS: tuple[StorageName, ...] = ("bfloat16", "int8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-documents", type=int, default=66, help="documents, for the sizes (default: 66)")
    parser.add_argument("--keep-ratio", type=ratio_of, nargs="+", default=[1 / 4, 1 / 8, 1 / 16], help="for the sizes")
    parser.add_argument("--entries", type=int, nargs="+", default=[64, 512], help="entries per head, for the times")
    parser.add_argument("--repeats", type=int, default=40, help="repeats, for the times (default: 40)")
    parser.add_argument("--results", type=Path, default=Path("docs/results/squad"), help="folder of kv-memory eval")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    print_all(args, differences(args.results, args.keep_ratio))
    backbone = Backbone.load("smollm2", dtype="bfloat16")
    print_all(args, [load_times(backbone, n, args.repeats) for n in args.entries])
    print_all(args, sizes(backbone, args.n_documents, args.keep_ratio))


def differences(folder: Path, ratios: list[float]) -> list[dict[str, Any]]:
    """Means and paired differences of KL and F1, by keep ratio."""
    columns: dict[tuple[str, float | None], dict[str, Record]] = {}
    for record in latest(load_records(folder)):
        columns.setdefault((record.method, record.keep_ratio), {})[record.document] = record
    rows = []
    for ratio in ratios:
        before, after = columns["adapter", ratio], columns["adapter+int8", ratio]
        documents = sorted(before.keys() & after.keys())
        pairs = [(d, list(zip(before[d].questions, after[d].questions, strict=True))) for d in documents]
        n = np.array([len(questions) for _, questions in pairs])
        draws = np.random.default_rng(0).multinomial(len(n), np.full(len(n), 1 / len(n)), size=10_000)
        row: dict[str, Any] = {"keep_ratio": ratio, "questions": int(n.sum())}
        row["same_answer"] = sum(a.answer == b.answer for _, questions in pairs for a, b in questions)
        for metric in ("kl", "f1"):
            by_document = [[(getattr(a, metric), getattr(b, metric)) for a, b in questions] for _, questions in pairs]
            old, new = (np.array([sum(pair[i] for pair in q) for q in by_document]) for i in range(2))
            low, high = np.quantile((draws @ (new - old)) / (draws @ n), [0.025, 0.975])
            row |= {metric: float(old.sum() / n.sum()), f"{metric}_int8": float(new.sum() / n.sum())}
            row[f"{metric}_difference"] = float((new - old).sum() / n.sum())
            row |= {f"{metric}_low": float(low), f"{metric}_high": float(high)}
        rows.append(row)
    return rows


def sizes(backbone: Backbone, n_documents: int, ratios: list[float]) -> list[dict[str, Any]]:
    """Bytes in each form, of all documents together, beside their uncompressed keys and values."""
    compressor = Compressor(backbone, adapter=Adapter.load(adapter_folder("shipped"), backbone))
    cases = find_task("squad").cases(backbone, TaskSettings(n_documents=n_documents))
    rows = []
    for ratio in ratios:
        caches = [compressor.compress(case.text, keep_ratio=ratio) for case in cases]
        full = sum(cache.n_tokens for cache in caches) * backbone.kv_bytes_per_token
        bf16, int8 = (sum(len(cache.to_bytes(storage=form)) for cache in caches) for form in FORMS)
        row = {"keep_ratio": ratio, "full_bytes": full, "bfloat16_bytes": bf16, "int8_bytes": int8}
        rows.append({**row, "int8_share": int8 / bf16, "bfloat16_factor": full / bf16, "int8_factor": full / int8})
    return rows


def load_times(backbone: Backbone, n_entries: int, repeats: int) -> dict[str, Any]:
    """Seconds from an opened store to keys and values that are read, in each form: the first time, and the second."""
    cache = make_cache(backbone, n_entries)
    times: dict[StorageName, list[tuple[float, float]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as folder:
        for form in FORMS:
            with Store.open(Path(folder) / form) as store:
                store.put("0" * 64, cache, storage=form)
        for _ in range(repeats + 1):
            for form in FORMS:
                with Store.open(Path(folder) / form) as store:
                    store.warm()
                    times[form].append((read(store, cache), read(store, cache)))
    row: dict[str, Any] = {"entries": n_entries}
    for which, name in enumerate(("first", "again")):
        bf16, int8 = (statistics.median(pair[which] for pair in times[form][1:]) for form in FORMS)  # one to warm up
        row |= {f"{name}_bfloat16_s": bf16, f"{name}_int8_s": int8, f"{name}_ratio": int8 / bf16}
    return row


def read(store: Store, cache: DistilledCache) -> float:
    """Seconds to get the cache from the store and to read it from end to end."""
    start_s = time.perf_counter()
    found = store.get("0" * 64, cache.fingerprint, cache.keep_ratio)
    _ = found.keys.sum(), found.values.sum()
    return time.perf_counter() - start_s


def make_cache(backbone: Backbone, n_entries: int) -> DistilledCache:
    """A cache of the model's shape with about `n_entries` entries in the mean head, zero to twice as many in others."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 2 * n_entries + 1, (backbone.num_layers, backbone.num_kv_heads), generator=draw)
    n = int(counts.sum())
    keys, values = (torch.randn(n, backbone.head_dim, generator=draw).to(backbone.dtype) for _ in range(2))
    return DistilledCache(
        keys=keys,
        values=values,
        positions=torch.cat([torch.arange(int(count)) for count in counts.flatten()]),
        counts=counts,
        n_tokens=8 * n_entries,
        keep_ratio=0.125,
        fingerprint=backbone.fingerprint(method="random"),
    )


def print_all(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """JSON lines, or a table in Markdown."""
    if args.json:
        print("\n".join(map(json.dumps, rows)), flush=True)
        return
    print(f"| {' | '.join(rows[0])} |\n|{' ---: |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.4g}' if isinstance(v, float) else f'{v:,}' for v in row.values())} |", flush=True)
    print()


if __name__ == "__main__":
    main()
