"""Advise: measures each keep_ratio on a user's own documents, and recommends one.

Passages are sampled from the documents, split as `add` would split them. For each passage the model generates
questions (the probes of refinement) and answers them from the full cache and from compressed ones, written and loaded
as in a store. So nothing but the documents is needed. Refinement itself is left out: it trains on such questions.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kv_memory.compress import RefineSettings
from kv_memory.compress.refine.probes import ProbeSettings, make_probes
from kv_memory.compress.refine.teacher import Teacher
from kv_memory.documents import Document, DocumentLike, read_documents, split_passages
from kv_memory.errors import ConfigError, DatasetError, DocumentError, EmptyDocumentError
from kv_memory.evaluate.aggregate import aggregate
from kv_memory.evaluate.cases import Case, Query
from kv_memory.evaluate.measure import Bench, Column, EvalProgress, check_limits
from kv_memory.evaluate.methods import Method, make_methods
from kv_memory.evaluate.metrics import normalise
from kv_memory.evaluate.question_records import Record
from kv_memory.evaluate.recommend import AdviceRow, Criteria, Recommendation, recommend
from kv_memory.evaluate.runner import DEFAULT_KEEP_RATIOS
from kv_memory.evaluate.scoring import KL_TOKENS
from kv_memory.evaluate.tasks.task import Task
from kv_memory.lazy_compressor import load_compressor
from kv_memory.model.backbone import Backbone
from kv_memory.settings import MemorySettings

_TRIES = 3  # passages sampled per passage needed: for some the model generates no question that it can answer
_QUESTIONS = 4  # per passage
# Half of the probes are questions; the others are short, because they are not used.
_PROBES = ProbeSettings(
    n_probes=2 * _QUESTIONS, n_held_out=0, probe_tokens=16, temperature=RefineSettings().temperature, seed=0
)
_ROOM_TOKENS = _PROBES.room + KL_TOKENS  # reserved after a passage
_TASK = Task(name="advise", cases=lambda backbone, settings: [], score=None, text_metrics=("em",))


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Measurements and a recommendation.

    Attributes:
        rows: Measured rows by falling keep_ratio; empty if no question could be generated.
        n_unanswered: Questions left out because the full cache gives no answer to them.
        n_too_long: Sampled passages that, with a question, are too long for the model's window.
        errors: Errors of documents that were left out.
        complete: False if the time limit ended the measurement early.
    """

    rows: tuple[AdviceRow, ...]
    recommendation: Recommendation
    n_documents: int
    n_unanswered: int
    n_too_long: int
    errors: tuple[DocumentError, ...]
    complete: bool


def advise(
    source: DocumentLike | Iterable[DocumentLike],
    *,
    settings: MemorySettings | None = None,
    backbone: Backbone | None = None,
    keep_ratios: Sequence[float] = DEFAULT_KEEP_RATIOS,
    criteria: Criteria | None = None,
    n_passages: int = 8,
    seed: int = 0,
    encoding: str = "utf-8",
    time_limit_s: float | None = None,
    on_progress: Callable[[EvalProgress], None] | None = None,
) -> Advice:
    """Measure keep_ratios on a sample of documents, and recommend one.

    Args:
        source: Texts, files and folders, as for `KVMemory.add`; unreadable ones are left out.
        settings: Settings for compression, e.g. those of a `KVMemory`; None means those of a new store. Refinement is
            switched off.
        backbone: The model, if it is loaded already.
        keep_ratios: Ratios to measure, in (0, 1].
        criteria: Criteria for the recommended keep_ratio.
        n_passages: Number of passages to sample. Up to 4 questions are asked about each.
        seed: Random seed for passages and questions. The same documents and seed give the same passages and questions.
        encoding: Encoding of text files without a byte order mark.
        time_limit_s: Time limit in seconds; unfinished passages do not count.
        on_progress: Called before each passage and keep_ratio.

    Raises:
        ConfigError: A setting is out of range.
        DocumentError: No document could be read.
        DatasetError: No passage fits the model's window.
        ModelError, AdapterError: As `KVMemory.open`.
    """
    start_s = time.monotonic()
    if n_passages < 1:
        raise ConfigError(f"n_passages must be at least 1, got {n_passages}", where="n_passages")
    ratios = check_limits(keep_ratios, time_limit_s)
    source = list(source) if isinstance(source, Iterator) else source
    read = read_documents(source, encoding=encoding, on_error="skip")
    if not read.documents:
        raise read.errors[0] if read.errors else EmptyDocumentError("no documents", where="source")
    settings = settings or MemorySettings.resolve({}, model=None if backbone is None else backbone.name)
    settings = replace(settings, refine_steps=0, min_fidelity=None)
    backbone = backbone or Backbone.load(settings.model, prompt=settings.prompt)
    compressor = load_compressor(settings, backbone)
    alone = compressor.adapter is not None and settings.selector != "combined"
    method = Method("adapter" if alone else settings.selector, compressor, "")
    columns = [Column(make_methods(["full"], backbone)[0], None)]
    columns += [Column(method, ratio, settings.storage) for ratio in ratios]
    bench = Bench(backbone, _TASK, settings.layout, generate=True)
    room = backbone.context_window - len(backbone.prefix_ids) - _ROOM_TOKENS
    drawn = list(itertools.islice(_draw(backbone, read.documents, settings.passage_tokens, seed), _TRIES * n_passages))
    fitting = [(document, text) for document, text in drawn if len(backbone.encode_document(text)) <= room]
    if not fitting:
        raise DatasetError(
            f"no passage leaves room for a question in a window of {backbone.context_window:,} tokens",
            where=read.documents[0].id,
            next_step="Cut documents into shorter passages (--passage-tokens), or use a model with a longer window.",
        )
    measured: list[list[Record]] = []  # one list per passage, one record per column
    n_unanswered, complete = 0, True
    for document, text in fitting:
        if len(measured) == n_passages or not complete:
            break
        case: Case | None = None
        records: list[Record] = []
        answered: list[bool] = []
        for column in columns:
            if time_limit_s is not None and time.monotonic() - start_s > time_limit_s:
                complete = False
                break
            if on_progress is not None:
                n_done, n_total = len(measured) * len(columns) + len(records), min(n_passages, len(fitting))
                on_progress(column.progress(document.id, n_done, n_done, n_total * len(columns)))
            case = case or _asked(backbone, text, seed)
            if case is None:
                break
            record = bench.run(case, column)
            answered = answered or [bool(normalise(question.answer or "")) for question in record.questions]
            if not any(answered):
                break
            records.append(replace(record, questions=tuple(itertools.compress(record.questions, answered))))
        if complete:
            n_unanswered += answered.count(False)
        if len(records) == len(columns):
            measured.append(records)
    rows = _rows(measured, backbone.kv_bytes_per_token)
    items = [source] if isinstance(source, str | os.PathLike | Document) else source
    what = [os.fspath(item) for item in items if isinstance(item, os.PathLike)] or ["PATH"]
    what += ["--encoding", encoding] if encoding != "utf-8" else []
    what += ["--skip-errors"] if read.errors else []
    return Advice(
        rows=rows,
        recommendation=recommend(rows, criteria=criteria or Criteria(), settings=settings, what=what),
        n_documents=len(read.documents),
        n_unanswered=n_unanswered,
        n_too_long=len(drawn) - len(fitting),
        errors=read.errors,
        complete=complete,
    )


def _draw(
    backbone: Backbone, documents: Sequence[Document], passage_tokens: int | None, seed: int
) -> Iterator[tuple[Document, str]]:
    """Passages without duplicates: one of each document in turn, longer documents tending to come first.

    A document is only split when its turn comes, so a large folder takes no longer than a small one.
    """
    draws = [random.Random(f"{seed}:{document.content_sha256}") for document in documents]
    # Exponential variables with the lengths as rates: each is the smallest with a probability by its document's length.
    first = [-math.log(1 - draw.random()) / len(document.text) for draw, document in zip(draws, documents, strict=True)]
    left: dict[int, list[str]] = {}
    seen: set[str] = set()
    order = sorted(range(len(documents)), key=first.__getitem__)
    while order:
        for index in list(order):
            if index not in left:
                text = documents[index].text
                left[index] = split_passages(text, max_tokens=passage_tokens, count_tokens=backbone.count_tokens)
                draws[index].shuffle(left[index])
            if not left[index]:
                order.remove(index)
            elif (passage := left[index].pop()) not in seen:
                seen.add(passage)
                yield documents[index], passage


def _asked(backbone: Backbone, text: str, seed: int) -> Case | None:
    """The passage with the questions that the model generates about it; None if it generates none."""
    ids = backbone.encode_document(text)
    teacher = Teacher(backbone, [ids], room=_PROBES.room, max_entries=RefineSettings().max_entries)
    (probes,) = make_probes(backbone, teacher, [ids], _PROBES._replace(seed=seed))
    queries = tuple(
        Query(text=probe.question, references=(probe.question,))  # placeholder: unknown, and unused
        for probe in probes
        if probe.kind == "question"
    )
    return Case(id=hashlib.sha256(text.encode()).hexdigest()[:16], text=text, queries=queries) if queries else None


def _rows(measured: Sequence[Sequence[Record]], kv_bytes_per_token: int) -> tuple[AdviceRow, ...]:
    """One row for each keep_ratio, from the records of each passage, the full cache's first."""
    found = []
    columns = list(zip(*measured, strict=True))
    for row, own in zip(aggregate(itertools.chain(*measured))[1:], columns[1:], strict=True):
        pairs = [
            (normalise(a.answer or ""), normalise(b.answer or ""))  # SQuAD's normal form; empty without a word
            for full, record in zip(columns[0], own, strict=True)
            for a, b in zip(full.questions, record.questions, strict=True)
        ]
        kl, keep_ratio = row.means["kl"], row.keep_ratio
        assert kl is not None and keep_ratio is not None
        found.append(
            AdviceRow(
                keep_ratio=keep_ratio,
                method=row.method,
                n_passages=row.n_documents,
                n_questions=row.n,
                size_bytes=sum(record.size_bytes or 0 for record in own) / len(own),
                full_bytes=sum(record.n_tokens for record in own) / len(own) * kv_bytes_per_token,
                kl=kl,
                kl_ci=row.ci["kl"],
                same=sum(bool(a) and a == b for a, b in pairs) / len(pairs),
                seconds=row.seconds_per_document or 0.0,
                prefills=row.prefills or 0.0,
            )
        )
    return tuple(found)
