"""What a job costs on top of bare compression, and whether its workers' memory stays flat. One JSON object.

    python benchmarks/jobs.py
    python benchmarks/jobs.py --n-documents 64 --rounds 5

Throughput: the passages of the same documents through `Compressor.compress` in a loop, and the documents through a job
with one worker process, its ledger and a new store; both alternate, and medians of the rounds are reported. Loading the
model counts on neither side: a job's time runs from the beginning of its first document to the end of its last one,
according to the ledger. Memory: a worker's resident set over 1,000 documents, compressed by a tiny random model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from packages import PACKAGES
from sqlalchemy import select

from kv_memory.cli.demo_documents import package_documents
from kv_memory.documents import Document, split_passages
from kv_memory.jobs import JobSettings, Ledger
from kv_memory.jobs.driver import JobRequest, create_job, drive
from kv_memory.jobs.engines import n_cores, threads_of
from kv_memory.jobs.engines.local import LocalEngine
from kv_memory.jobs.events import Event, JobEnded
from kv_memory.jobs.job_tables import TaskRow
from kv_memory.lazy_compressor import load_compressor
from kv_memory.model.backbone import Backbone
from kv_memory.settings import MemorySettings
from kv_memory.store import Store

_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-documents", type=int, default=32, help="documents for the throughput (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, one after another (default: 3)")
    parser.add_argument("--model", default="smollm2", help="model for the throughput (default: smollm2)")
    parser.add_argument("--n-small", type=int, default=1000, help="documents for the memory (default: 1,000)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as name:
        folder = Path(name)
        found = throughput(folder, args.model, args.n_documents, args.rounds)
        found |= memory(folder, args.n_small)
    print(json.dumps(found, indent=2))


def throughput(folder: Path, model: str, n_documents: int, rounds: int) -> dict[str, Any]:
    """Documents and tokens a second, of a job and of the bare loop."""
    import torch

    settings = MemorySettings.resolve({}, model=model)
    documents = _documents(n_documents)
    source = _written(folder / "documents.jsonl", documents)
    torch.set_num_threads(threads_of(n_cores()))
    backbone = Backbone.load(settings.model, prompt=settings.prompt)
    compressor = load_compressor(settings, backbone)
    limit, count = settings.passage_tokens, backbone.count_tokens
    cut = [p for d in documents for p in split_passages(d.text, max_tokens=limit, count_tokens=count)]
    passages = list(dict.fromkeys(cut))  # equal ones are compressed once by the job too
    compressor.compress(passages[0], keep_ratio=settings.keep_ratio)  # warm up
    bare, job, tokens = [], [], 0
    for number in range(rounds):
        start_s = time.perf_counter()
        for passage in passages:
            compressor.compress(passage, keep_ratio=settings.keep_ratio)
        bare.append(n_documents / (time.perf_counter() - start_s))
        ended, seconds, _ = _run(folder / f"store {number}", source, settings)
        job.append(n_documents / seconds)
        tokens = ended.n_tokens
        assert ended.n_passages == len(passages)
        print(f"round {number + 1}: bare {bare[-1]:.3f}, job {job[-1]:.3f} documents/s", file=sys.stderr, flush=True)
    return {
        "model": model,
        "n_documents": n_documents,
        "n_passages": len(passages),
        "n_threads": threads_of(n_cores()),
        "documents_per_s": statistics.median(job),
        "bare_documents_per_s": statistics.median(bare),
        "tokens_per_s": statistics.median(job) * tokens / n_documents,
        "ratio_to_bare_loop": statistics.median(a / b for a, b in zip(job, bare, strict=True)),
    }


def memory(folder: Path, n_documents: int) -> dict[str, Any]:
    """A worker's resident set, after a tenth of the documents and after all."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import make_model, make_tokenizer

    tiny = folder / "tiny"
    make_model("llama", max_position_embeddings=4096).save_pretrained(tiny)
    make_tokenizer().save_pretrained(tiny)
    settings = MemorySettings.resolve({}, model=tiny, selector="attention")
    names = [f"Pier {n}" for n in range(n_documents)]
    texts = [Document(id=name, text=f"{name} has a ferry that leaves at 7.40. " * 8) for name in names]
    ended, seconds, sizes = _run(folder / "tiny store", _written(folder / "small.jsonl", texts), settings)
    assert (ended.added, ended.failed) == (n_documents, 0), ended
    # On a quick machine a tenth may be done before the first look.
    early = max([size for done, size in sizes if done <= n_documents // 10] or [sizes[0][1]])
    return {
        "small_documents": n_documents,
        "small_documents_per_s": n_documents / seconds,
        "worker_rss_mb_at_a_tenth": early / 1e6,
        "worker_rss_mb_at_the_end": sizes[-1][1] / 1e6,
        "worker_rss_growth_mb": (sizes[-1][1] - early) / 1e6,
    }


def _run(path: Path, source: Path, settings: MemorySettings) -> tuple[JobEnded, float, list[tuple[int, int]]]:
    """A job with one worker: how it ended, its seconds, and the worker's bytes by documents done."""
    sizes: list[tuple[int, int]] = []
    with Store.open(path) as store:
        engine = LocalEngine(path, n_workers=1)

        def watch(event: Event) -> None:
            for pid in engine.pids:
                if event.kind == "progress" and (done := event.done):  # type: ignore[attr-defined]
                    sizes.append((done, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE))

        asked = JobSettings(memory=dataclasses.asdict(settings))
        job = create_job(store, JobRequest(sources=[str(source)]), asked)
        ended = drive(store, job, engine, on_event=watch)
        with store.catalog.read() as session:
            rows = session.execute(
                select(TaskRow.updated_at, TaskRow.elapsed_s).where(TaskRow.job_id == Ledger(store).job(job.name).id)
            ).all()
    begun = min(end - timedelta(seconds=elapsed_s or 0) for end, elapsed_s in rows)
    return ended, (max(end for end, _ in rows) - begun).total_seconds(), sizes


def _documents(n: int) -> list[Document]:
    """Descriptions of installed packages, of several passages each; no two sentences are the same."""
    packages = package_documents(PACKAGES, max_chars=3000)
    texts = [packages[k % len(packages)].text.replace(". ", f" ({k}). ") for k in range(n)]
    return [Document(id=f"document {k}", text=f"Note {k}: {text}") for k, text in enumerate(texts)]


def _written(path: Path, documents: list[Document]) -> Path:
    lines = (json.dumps({"id": document.id, "text": document.text}) for document in documents)
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    main()
