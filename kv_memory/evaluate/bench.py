"""Bench: measures one document after the other, with every method, beside the full model's own answers."""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kv_memory.backbone import Backbone
from kv_memory.cache import DistilledCache
from kv_memory.config import Layout, StorageName
from kv_memory.evaluate.cases import Case, EncodedQuery, encode_query
from kv_memory.evaluate.measure import measure
from kv_memory.evaluate.methods import Method, make_methods
from kv_memory.evaluate.records import Record
from kv_memory.evaluate.task import Task
from kv_memory.evaluate.teacher import TeacherAnswer, teach

__all__ = ["Bench", "Column"]


@dataclass(frozen=True, eq=False)
class Column:
    """A method at a keep_ratio, None for the methods that have none, and how its caches are stored."""

    method: Method
    keep_ratio: float | None
    storage: StorageName = "auto"

    @property
    def name(self) -> str:
        """The method's name in tables: `adapter+int8` for caches stored as int8."""
        return self.method.name if self.storage == "auto" else f"{self.method.name}+{self.storage}"


class Bench:
    """Measures columns; the full model's answers are kept while the document stays the same.

    Args:
        backbone: The model.
        task: Which measures apply.
        layout: How documents are placed.
        generate: Whether to decode answers.
    """

    def __init__(self, backbone: Backbone, task: Task, layout: Layout, generate: bool) -> None:
        self._backbone, self._task, self._layout, self._generate = backbone, task, layout, generate
        self._full: Method = make_methods(["full"], backbone)[0]
        self._warm = False
        self._case: Case | None = None
        self._taught: list[TeacherAnswer] = []
        self._encoded: list[EncodedQuery] = []
        self._plain: DistilledCache | None = None
        self._prefill_s = 0.0

    def run(self, case: Case, column: Column, *, key: str, config: str) -> Record:
        """Measure one document with one method."""
        if self._case is not case:
            self._take(case)
        assert self._plain is not None
        cache, elapsed_s = self._compress(case, column)
        size_bytes = None
        if cache is not None and column.method.ratios:
            cache, size_bytes = _stored(cache, case.text, column.storage)
        questions = measure(
            self._backbone,
            [] if cache is None else [cache],
            case,
            self._encoded,
            self._taught,
            self._task,
            layout=self._layout,
            generate=self._generate,
        )
        return Record(
            key=key,
            config=config,
            task=self._task.name,
            document=case.id,
            method=column.name,
            keep_ratio=column.keep_ratio,
            model=self._backbone.name,
            weights=self._backbone.weights_sha256,
            n_tokens=self._plain.n_tokens,
            n_kept=0 if cache is None else cache.n_kept,
            compress_s=elapsed_s,
            prefill_s=self._prefill_s,
            size_bytes=size_bytes,
            cell=case.cell,
            questions=tuple(questions),
        )

    def _take(self, case: Case) -> None:
        """Read a document in full and ask the model everything."""
        if not self._warm:  # the first pass also reads the shared prefix, and a GPU compiles its kernels
            self._compress(case, Column(self._full, None))
            self._warm = True
        self._case = case
        self._plain, self._prefill_s = self._timed_prefill(case)
        self._encoded = [encode_query(self._backbone, query) for query in case.queries]
        self._taught = teach(self._backbone, self._plain, case, self._encoded, self._task, layout=self._layout)

    def _timed_prefill(self, case: Case) -> tuple[DistilledCache, float]:
        cache, elapsed_s = self._compress(case, Column(self._full, None))
        assert cache is not None and elapsed_s is not None
        return cache, elapsed_s

    def _compress(self, case: Case, column: Column) -> tuple[DistilledCache | None, float | None]:
        compressor = column.method.compressor
        if compressor is None:
            return None, None
        self._wait()
        start_s = time.perf_counter()
        cache = compressor.compress(
            case.text,
            keep_ratio=1.0 if column.keep_ratio is None else column.keep_ratio,
            unasked_spans=[query.span for query in case.queries if query.span is not None],
        )
        self._wait()
        return cache, time.perf_counter() - start_s

    def _wait(self) -> None:
        """A GPU works on after the call has returned."""
        if self._backbone.device.type == "cuda":
            torch.cuda.synchronize(self._backbone.device)


def _stored(cache: DistilledCache, text: str, storage: StorageName) -> tuple[DistilledCache, int]:
    """What is read of a cache after it was written, and the bytes it takes in a store."""
    with tempfile.TemporaryDirectory(prefix="kv-memory-eval-") as folder:
        path = Path(folder) / "cache"
        replace(cache, text_sha256=hashlib.sha256(text.encode()).hexdigest()).save(path, storage=storage)
        return DistilledCache.load(path, device=str(cache.keys.device)), path.stat().st_size
