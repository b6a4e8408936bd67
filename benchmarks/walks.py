"""How many functions and files of the package one call crosses, on a tiny random model.

    python benchmarks/walks.py            # a table
    python benchmarks/walks.py --json     # `walk functions files transactions`, one object per line
    python benchmarks/walks.py --list get # the functions of one walk, in the order in which they are first called

Walks: `add`, one short text added to an open memory; `ask`, a question to its first token, where another question was
asked before; `get`, a warm `Store.get`; `job`, one document of a job in its worker, after another one. Functions are
counted once each, generators as well; comprehensions and lambdas are not. Transactions are those of the catalog.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kv_memory.jobs.job_records import JobSettings, SourceItem  # noqa: E402
from kv_memory.jobs.leases import TaskQueue  # noqa: E402
from kv_memory.jobs.ledger import Ledger  # noqa: E402
from kv_memory.jobs.sources import Sources  # noqa: E402
from kv_memory.jobs.worker import pipeline_of, work  # noqa: E402
from kv_memory.settings import MemorySettings  # noqa: E402
from kv_memory.store import Store  # noqa: E402
from tests.conftest import make_model, make_tokenizer  # noqa: E402
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, open_memory, wide_backbone  # noqa: E402

_PACKAGE = str(ROOT / "kv_memory")
_TRANSACTIONS = {"Catalog._transaction"}


class Walk:
    """Functions that were called while it was traced.

    Attributes:
        functions: Code objects, in the order of their first calls.
        n_transactions: Number of transactions of the catalog.
    """

    def __init__(self) -> None:
        self.functions: dict[CodeType, None] = {}
        self.n_transactions = 0
        self._begun: set[int] = set()

    @contextmanager
    def traced(self) -> Iterator[Walk]:
        """Trace all threads."""
        threading.setprofile_all_threads(self._see) if sys.version_info >= (3, 12) else threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield self
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(_PACKAGE) or code.co_name.startswith("<"):
            return
        self.functions.setdefault(code)
        if code.co_qualname in _TRANSACTIONS and id(frame) not in self._begun:
            self.n_transactions += 1
            self._begun.add(id(frame))  # a generator's frame is called again at its end
        elif code.co_qualname in _TRANSACTIONS:
            self._begun.discard(id(frame))

    @property
    def n_files(self) -> int:
        """Number of files these functions are in."""
        return len({code.co_filename for code in self.functions})


def walks(folder: Path) -> dict[str, Walk]:
    """All walks, each on a store of its own."""
    found = {name: Walk() for name in ("add", "ask", "get", "job")}
    with open_memory(folder / "memory", wide_backbone()) as memory:
        memory.add([("lamp", LAMP)])
        with found["add"].traced():
            memory.add([("ferry", FERRY)])
        memory.ask(LAMP_QUESTION, top_k=1)
        with found["ask"].traced():
            stream = memory.stream(FERRY_QUESTION, top_k=1)
            next(iter(stream))
        stream.close()
        (info,) = memory.store.caches("ferry")
        arguments = info.text_sha256, memory.compressor.fingerprint(), info.keep_ratio
        memory.store.get(*arguments)
        with found["get"].traced():
            memory.store.get(*arguments)
    job_walk(folder, found["job"])
    return found


def job_walk(folder: Path, walk: Walk) -> None:
    """One document in a worker, which has done another one before."""
    model, texts = folder / "model", folder / "texts"
    make_model("llama", max_position_embeddings=4096).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    texts.mkdir()
    (texts / "lamp.txt").write_text(LAMP)
    (texts / "ferry.txt").write_text(FERRY)
    settings = MemorySettings.resolve({}, model=model, selector="attention")
    with Store.open(folder / "job") as store:
        ledger, asked = Ledger(store), JobSettings(memory=dataclasses.asdict(settings))
        sources = {"items": [{"kind": "files", "path": str(texts), "glob": None}], "sync": None}
        job = ledger.create("walk", sources=sources, settings=asked)
        with (
            ledger.hold_worker_lock("worker"),
            closing(Sources(sources["items"], asked)) as opened,
            TaskQueue(store, job.id, "worker") as queue,
        ):
            pipeline = pipeline_of(store, job)
            for name in ("lamp", "ferry"):
                ledger.add(job, [SourceItem(document_id=name, uri=(texts / f"{name}.txt").as_uri())])
                ledger.update(job, discovered=True)
                looks = iter([False])  # the driver lives at the first look, so that one task is claimed, and no other
                with nullcontext() if name == "lamp" else walk.traced():
                    work(queue, opened, pipeline, alone=lambda looks=looks: next(looks, True))
        counts = ledger.counts(job)
        assert (counts.done, counts.failed) == (2, 0), counts


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--list", choices=["add", "ask", "get", "job"], help="the functions of one walk")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = walks(Path(folder))
    if args.list:
        for code in found[args.list].functions:
            print(f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_qualname}")
        return
    if not args.json:
        print(f"{'walk':>5} {'functions':>10} {'files':>6} {'transactions':>13}")
    for name, walk in found.items():
        n_functions = len(walk.functions)
        if args.json:
            row = {"walk": name, "functions": n_functions, "files": walk.n_files, "transactions": walk.n_transactions}
            print(json.dumps(row))
        else:
            print(f"{name:>5} {n_functions:>10} {walk.n_files:>6} {walk.n_transactions:>13}")


if __name__ == "__main__":
    main()
