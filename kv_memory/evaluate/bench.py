"""Bench: measures one document after the other, with every method, against the full model's own answers."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, PrefilledDocument
from kv_memory.config import Layout, StorageName
from kv_memory.evaluate.cases import Case, EncodedQuery, encode_query
from kv_memory.evaluate.measure import measure
from kv_memory.evaluate.methods import Method, make_methods
from kv_memory.evaluate.reference_answers import TeacherAnswer, teach
from kv_memory.evaluate.results import Record
from kv_memory.evaluate.task import Task
from kv_memory.model.backbone import Backbone

__all__ = ["Bench", "Column"]


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Column:
    """A method at a keep_ratio (None for methods without one), and the storage type of its caches.

    `joined` applies to `full` and several documents: one cache for each document, joined, instead of one prefill of
    all texts.
    """

    method: Method
    keep_ratio: float | None
    storage: StorageName = "auto"
    joined: bool = False

    @property
    def name(self) -> str:
        """The method's name in tables: `adapter+int8` for caches stored as int8, or `full+joined`."""
        name = self.method.name if self.storage == "auto" else f"{self.method.name}+{self.storage}"
        return f"{name}+joined" if self.joined else name


class Bench:
    """Measures columns; the full model's answers are reused while the case stays the same.

    Caches of passages are reused while cases share them: the same passage occurs again at another place.

    Args:
        backbone: The model.
        task: The task, which determines the metrics.
        layout: Placement of documents.
        generate: True to decode answers.
    """

    def __init__(self, backbone: Backbone, task: Task, layout: Layout, generate: bool) -> None:
        self._backbone, self._task, self._layout, self._generate = backbone, task, layout, generate
        full = make_methods(["full"], backbone)[0]
        self._full, self._joined = Column(full, None), Column(full, None, joined=True)
        self._made: dict[tuple[str, float | None, str], _Made] = {}
        self._compressor: Compressor | None = None  # compressor of the documents in `_prefilled`
        self._prefilled: dict[str, tuple[PrefilledDocument, float]] = {}
        self._warm = False
        self._case: Case | None = None
        self._taught: list[TeacherAnswer] = []
        self._encoded: list[EncodedQuery] = []
        self._plain: DistilledCache | None = None
        self._prefill_s = 0.0

    def run(self, case: Case, column: Column, *, key: str, config: str) -> Record:
        """Measure one case with one method."""
        if self._case is not case:
            self._take(case)
        assert self._plain is not None
        caches, elapsed_s, size_bytes = self._caches(case, column)
        questions = measure(
            self._backbone,
            caches,
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
            n_kept=sum(cache.n_kept for cache in caches),
            compress_s=elapsed_s,
            prefill_s=self._prefill_s,
            size_bytes=size_bytes,
            cell=case.cell,
            group=case.group,
            questions=tuple(questions),
        )

    def _take(self, case: Case) -> None:
        """Prefill all documents of a case in full, and collect the full model's answers to its questions."""
        if not self._warm:  # the first pass also prefills the shared prefix, and compiles kernels on a GPU
            self._caches(case, self._full)
            self._warm = True
        self._case, self._prefilled = case, {}
        self._made = {key: made for key, made in self._made.items() if key[2] in case.passages}
        (self._plain,), elapsed_s, _ = self._caches(case, self._full)
        self._prefill_s = elapsed_s or 0.0
        self._encoded = [encode_query(self._backbone, query) for query in case.queries]
        joined = self._caches(case, self._joined)[0] if case.passages else []
        self._taught = teach(self._backbone, self._plain, self._encoded, self._task, layout=self._layout, joined=joined)

    def _caches(self, case: Case, column: Column) -> tuple[list[DistilledCache], float | None, int | None]:
        """A method's caches of the documents, the seconds they took (now or for an earlier case), and their bytes."""
        compressor = column.method.compressor
        if compressor is None:
            return [], None, None
        if not column.method.ratios and not column.joined:
            ids = [token for text in case.documents for token in self._backbone.encode_document(text)]
            cache, elapsed_s = self._timed(partial(compressor.compress_ids, ids, keep_ratio=1.0))
            return [cache], elapsed_s, None
        found = []
        for text in case.documents:
            key = (column.name, column.keep_ratio, text)
            if (made := self._made.get(key)) is None:
                made = self._distil(compressor, text, case, column)
                if case.passages:
                    self._made[key] = made
            found.append(made)
        size_bytes = sum(made.size_bytes for made in found) if column.method.ratios else None
        return [made.cache for made in found], sum(made.elapsed_s for made in found), size_bytes

    def _distil(self, compressor: Compressor, text: str, case: Case, column: Column) -> _Made:
        unasked = [query.span for query in case.queries if query.span is not None]
        if column.keep_ratio is None:  # the full cache of one of several documents
            cache, keep_s = self._timed(partial(compressor.compress, text, keep_ratio=1.0))
            prefill_s = 0.0
        else:
            document, prefill_s = self._prefilled_by(compressor, text)
            cache, keep_s = self._timed(partial(document.keep, column.keep_ratio, unasked_spans=unasked))
        stored, size_bytes = _stored(cache, text, column.storage)
        return _Made(stored, prefill_s + keep_s, size_bytes)

    def _prefilled_by(self, compressor: Compressor, text: str) -> tuple[PrefilledDocument, float]:
        """A method's prefill of a document, reused for all ratios (they follow each other), and the seconds it took."""
        if self._compressor is not compressor:
            self._compressor, self._prefilled = compressor, {}
        if text not in self._prefilled:
            self._prefilled[text] = self._timed(partial(compressor.prefill, text))
        return self._prefilled[text]

    def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        self._wait()
        start_s = time.perf_counter()
        made = work()
        self._wait()
        return made, time.perf_counter() - start_s

    def _wait(self) -> None:
        """Wait for the GPU, which still computes after a call has returned."""
        if self._backbone.device.type == "cuda":
            torch.cuda.synchronize(self._backbone.device)


class _Made(NamedTuple):
    """One document's cache, the seconds it took, and its size in a store in bytes."""

    cache: DistilledCache
    elapsed_s: float
    size_bytes: int


def _stored(cache: DistilledCache, text: str, storage: StorageName) -> tuple[DistilledCache, int]:
    """The cache as it is loaded after it was written, and its size in a store in bytes."""
    with tempfile.TemporaryDirectory(prefix="kv-memory-eval-") as folder:
        path = Path(folder) / "cache"
        replace(cache, text_sha256=hashlib.sha256(text.encode()).hexdigest()).save(path, storage=storage)
        return DistilledCache.load(path, device=str(cache.keys.device)), path.stat().st_size
