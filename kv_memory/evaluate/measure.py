"""Measure: one document after the other, with every method, against the full model's own answers."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, PrefilledDocument
from kv_memory.config import Layout, StorageName, check_keep_ratio
from kv_memory.errors import ConfigError
from kv_memory.evaluate.cases import Case
from kv_memory.evaluate.methods import Method, make_methods
from kv_memory.evaluate.question_records import Record
from kv_memory.evaluate.scoring import CaseScorer
from kv_memory.evaluate.tasks.task import Task
from kv_memory.generate import add_bias
from kv_memory.model.backbone import Backbone

T = TypeVar("T")


def check_limits(keep_ratios: Sequence[float], time_limit_s: float | None) -> list[float]:
    """The ratios without duplicates, falling; a ConfigError if one of them, or the time limit, is out of range."""
    if time_limit_s is not None and time_limit_s <= 0:
        raise ConfigError(f"the time limit must be above 0, got {time_limit_s}", where="time_limit_s")
    if not keep_ratios:
        raise ConfigError("no keep_ratio is given", where="keep_ratio", next_step="Pass for example --keep-ratio 1/4.")
    return sorted({check_keep_ratio(ratio) for ratio in keep_ratios}, reverse=True)


@dataclass(frozen=True)
class EvalProgress:
    """Progress of an evaluation before its next measurement, which is one document with one column.

    Attributes:
        n_done: Measurements done, including those found in the folder.
        n_measured: Measurements done by this call.
        n_total: Measurements in total: documents times columns.
    """

    n_done: int
    n_measured: int
    n_total: int
    document_id: str
    method: str
    keep_ratio: float | None


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

    def progress(self, document_id: str, n_done: int, n_measured: int, n_total: int) -> EvalProgress:
        """Progress before this column is measured on a document."""
        return EvalProgress(n_done, n_measured, n_total, document_id, self.name, self.keep_ratio)


class _Made(NamedTuple):
    """One document's cache, the seconds it took (now or for an earlier case), and its size in a store in bytes."""

    cache: DistilledCache
    elapsed_s: float
    size_bytes: int


class Bench:
    """Measures columns; the full model's answers are reused while the case stays the same.

    Caches of passages are reused while cases share them: the same passage occurs again at another place.
    """

    def __init__(
        self, backbone: Backbone, task: Task, layout: Layout, generate: bool, *, rank_bias: float = 0.0
    ) -> None:
        self._backbone, self._task, self._rank_bias = backbone, task, rank_bias
        self._scorer_of = partial(CaseScorer, backbone, task, layout=layout, generate=generate)
        full = make_methods(["full"], backbone)[0]
        self._full, self._joined = Column(full, None), Column(full, None, joined=True)
        self._made: dict[tuple[str, float | None, str], _Made] = {}
        self._compressor: Compressor | None = None  # compressor of the documents in `_prefilled`
        self._prefilled: dict[str, tuple[PrefilledDocument, float]] = {}
        self._case: Case | None = None
        self._plain: _Made
        self._scorer: CaseScorer

    def run(self, case: Case, column: Column, *, key: str = "", config: str = "") -> Record:
        """Measure one case with one method."""
        if self._case is not case:
            self._take(case)
        made = self._caches(case, column)
        caches = self._ranked(case, made)
        return Record(
            key=key,
            config=config,
            task=self._task.name,
            document=case.id,
            method=column.name if self._backbone.weights == "plain" else f"{column.name}@{self._backbone.weights}",
            keep_ratio=column.keep_ratio,
            model=self._backbone.name,
            weights=self._backbone.weights_sha256,
            n_tokens=self._plain.cache.n_tokens,
            n_kept=sum(cache.n_kept for cache in caches),
            compress_s=sum(one.elapsed_s for one in made) if made else None,
            prefill_s=self._plain.elapsed_s,
            size_bytes=sum(one.size_bytes for one in made) if column.method.ratios else None,
            cell=case.cell,
            group=case.group,
            questions=tuple(self._scorer.score(caches)),
        )

    def _take(self, case: Case) -> None:
        """Prefill all documents of a case in full, and collect the full model's answers to its questions."""
        if self._case is None:  # the first pass also prefills the shared prefix, and compiles kernels on a GPU
            self._caches(case, self._full)
        self._case, self._prefilled = case, {}
        self._made = {key: made for key, made in self._made.items() if key[2] in case.passages}
        (self._plain,) = self._caches(case, self._full)
        joined = self._ranked(case, self._caches(case, self._joined)) if case.passages else []
        self._scorer = self._scorer_of(case, self._plain.cache, joined)

    def _ranked(self, case: Case, made: Sequence[_Made]) -> list[DistilledCache]:
        """The caches with the biases of a ranking in which the case's own document is the best."""
        if len(made) < 2:
            return [one.cache for one in made]
        texts = zip(made, case.documents, strict=True)
        return [add_bias(one.cache, 0.0 if text == case.text else self._rank_bias) for one, text in texts]

    def _caches(self, case: Case, column: Column) -> list[_Made]:
        """A method's caches of the documents; one for `full`, and none for `none`."""
        compressor = column.method.compressor
        if compressor is None:
            return []
        if not column.method.ratios and not column.joined:
            ids = [token for text in case.documents for token in self._backbone.encode_document(text)]
            return [_Made(*self._timed(partial(compressor.compress_ids, ids, keep_ratio=1.0)), 0)]
        found = []
        for text in case.documents:
            key = (column.name, column.keep_ratio, text)
            made = self._made.get(key) or self._compress(compressor, text, case, column)
            if case.passages:
                self._made[key] = made
            found.append(made)
        return found

    def _compress(self, compressor: Compressor, text: str, case: Case, column: Column) -> _Made:
        if column.keep_ratio is None:  # the full cache of one of several documents
            cache, elapsed_s = self._timed(partial(compressor.compress, text, keep_ratio=1.0))
        else:
            if self._compressor is not compressor:
                self._compressor, self._prefilled = compressor, {}
            if text not in self._prefilled:  # one prefill for all ratios, which follow each other
                self._prefilled[text] = self._timed(partial(compressor.prefill, text))
            document, prefill_s = self._prefilled[text]
            unasked = [query.span for query in case.queries if query.span is not None]
            cache, elapsed_s = self._timed(partial(document.keep, column.keep_ratio, unasked_spans=unasked))
            elapsed_s += prefill_s
        return _stored(cache, text, column.storage, elapsed_s)

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


def _stored(cache: DistilledCache, text: str, storage: StorageName, elapsed_s: float) -> _Made:
    """The cache as it is loaded after it was written."""
    with tempfile.TemporaryDirectory(prefix="kv-memory-eval-") as folder:
        path = Path(folder) / "cache"
        replace(cache, text_sha256=hashlib.sha256(text.encode()).hexdigest()).save(path, storage=storage)
        return _Made(DistilledCache.load(path, device=str(cache.keys.device)), elapsed_s, path.stat().st_size)
