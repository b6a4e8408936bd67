"""The runner: measures every document of a task with every method, once, and saves each result immediately."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from kv_memory.compress import Adapter, RefineSettings
from kv_memory.config import Layout, StorageName, WeightsName, check_choice, check_rank_bias
from kv_memory.evaluate.aggregate import Row, aggregate, check_groups
from kv_memory.evaluate.measure import Bench, Column, EvalProgress, check_limits
from kv_memory.evaluate.methods import RefineFrom, make_methods
from kv_memory.evaluate.question_records import Record, append_record, load_records
from kv_memory.evaluate.scoring import KL_TOKENS
from kv_memory.evaluate.tasks import find_task
from kv_memory.evaluate.tasks.task import Task, TaskSettings
from kv_memory.model.backbone import Backbone

DEFAULT_KEEP_RATIOS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
# Part of every key. Raise it when a measure changes its meaning; the package's own version does not reflect that.
_MEASURES_VERSION = 2  # 2: an answer begins with a visible character


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        rows: Rows of the table, over the documents that every column has.
        n_documents: Number of the task's documents under these settings; places of one passage count separately.
        n_finished: Number of these documents that every column has.
        complete: False if the time limit ended it early; the same call with the same folder resumes it.
    """

    task: str
    rows: tuple[Row, ...]
    records: tuple[Record, ...]
    n_documents: int
    n_finished: int
    complete: bool


def evaluate(
    task: str,
    *,
    backbone: Backbone,
    methods: Sequence[str] | None = None,
    keep_ratios: Sequence[float] = DEFAULT_KEEP_RATIOS,
    adapter: Adapter | None = None,
    settings: TaskSettings | None = None,
    refine: RefineSettings | None = None,
    refine_from: RefineFrom = "auto",
    layout: Layout = "source",
    rank_bias: float = 0.0,
    storage: StorageName = "auto",
    generate: bool = True,
    by: Sequence[str] | None = None,
    out: Path | str | None = None,
    time_limit_s: float | None = None,
    on_progress: Callable[[EvalProgress], None] | None = None,
) -> Evaluation:
    """Measure the loss in answers when documents are compressed.

    The question is never seen at compression. Every method is asked the same questions in the same prompts. KL is
    measured against the model with the full cache; for several documents, that is one prefill of all texts.

    Args:
        task: `squad`, `quality`, `squality`, `needle`, `spans`, `multidoc`, `ruler` or `qa`.
        backbone: The model. With int8 weights, KL is measured against its plain ones, and methods are named
            `full@int8` and so on.
        methods: full, none, random, sink_recent, attention, reconstruction, matched_score, matched_fit,
            matched_one_stage, matched_fixed_keys, matched_even_layers, matched, adapter_selection, adapter, combined or
            refined; None means all that can be run.
        keep_ratios: Ratios to measure, in (0, 1]; `full` and `none` have no ratio.
        adapter: Adapter attached to the backbone, for the methods that need one and as the start of `refined`.
        settings: Selection of documents, see `TaskSettings`. Its seed is also that of `random` and of the intervals.
        refine: Settings of `refined`.
        refine_from: Starting point of `refined`, see `make_methods`.
        layout: Placement of documents, see `compose`.
        rank_bias: multidoc: bias of the other passages, see `MemorySettings`.
        storage: Storage type in which every compressed cache is written and loaded before it is used. Unless it is
            `auto`, the methods are named `adapter+int8` and so on. `full` and `none` are not affected.
        generate: False skips metrics of decoded answers (F1 and similar) for speed.
        by: One row per value of k or place (multidoc), length or kind (ruler); others are averaged. None means k, or
            length and kind.
        out: Folder for `examples.jsonl`; results that it contains are not measured again.
        time_limit_s: Time limit in seconds, checked before each document and method.
        on_progress: Called before each document and method, and at the end.

    Raises:
        ConfigError: A name or setting is wrong, or a method lacks its adapter.
        DatasetError: The set is missing, has no suitable document, or the folder cannot be written to.
        BrokenLineError: The folder's file contains other data.
        ContextWindowError: Document, question and answer do not fit the model.
    """
    start_s = time.monotonic()
    found_task = find_task(task)
    settings = settings or TaskSettings()
    check_groups(task, by or ())
    check_choice(layout, Layout, where="layout")
    check_choice(storage, StorageName, where="storage")
    check_rank_bias(rank_bias)
    ratios = check_limits(keep_ratios, time_limit_s)
    made = make_methods(methods, backbone, adapter=adapter, refine=refine, refine_from=refine_from, seed=settings.seed)
    columns = [
        Column(method, ratio, storage if method.ratios else "auto", joined)
        for method in made
        for joined in ((False, True) if found_task.together and method.name == "full" else (False,))
        for ratio in (ratios if method.ratios else (None,))
    ]
    known = {record.key: record for record in load_records(Path(out))} if out is not None else {}
    cases = found_task.cases(backbone, settings)
    weights = backbone.weights
    configs = {
        column: _config(found_task, column, settings, layout, generate, weights, rank_bias) for column in columns
    }
    keys = [
        [hashlib.sha256(f"{configs[column]}:{case.digest}".encode()).hexdigest() for column in columns]
        for case in cases
    ]
    bench = Bench(backbone, found_task, layout, generate, rank_bias=rank_bias)
    n_done, n_measured, complete = 0, 0, True
    # Document by document: the full model is asked once for all methods, and an interrupted run stays paired.
    for (case, column), key in zip(product(cases, columns), chain.from_iterable(keys), strict=True):
        progress = column.progress(case.id, n_done, n_measured, len(cases) * len(columns))
        if key not in known:
            if time_limit_s is not None and time.monotonic() - start_s > time_limit_s:
                complete = False
                break
            if on_progress is not None:
                on_progress(progress)
            known[key] = bench.run(case, column, key=key, config=configs[column])
            if out is not None:
                append_record(Path(out), known[key])
            n_measured += 1
        n_done += 1
    if cases and on_progress is not None:
        on_progress(replace(progress, n_done=n_done, n_measured=n_measured))
    records = tuple(known[key] for key in chain.from_iterable(keys) if key in known)
    return Evaluation(
        task=task,
        rows=tuple(aggregate(records, seed=settings.seed, by=by)),
        records=records,
        n_documents=len(cases),
        n_finished=sum(known.keys() >= {*of_case} for of_case in keys),
        complete=complete,
    )


def _config(
    task: Task,
    column: Column,
    settings: TaskSettings,
    layout: Layout,
    generate: bool,
    weights: WeightsName,
    rank_bias: float,
) -> str:
    decides: dict[str, Any] = {
        "version": _MEASURES_VERSION,
        "task": task.name,
        "max_new_tokens": task.max_new_tokens,
        "kl_tokens": KL_TOKENS,
        "method": column.method.digest,
        "keep_ratio": column.keep_ratio,
        "layout": layout,
        "generate": generate and bool(task.text_metrics),
        "seed": settings.seed if task.drawn else None,
    }
    if column.storage != "auto":  # omitted if `auto`, so that results from before this setting stay valid
        decides["storage"] = column.storage
    if weights != "plain":
        decides["weights"] = weights
    if rank_bias and task.together and (column.joined or column.method.ratios):  # the others join nothing
        decides["rank_bias"] = rank_bias
    if column.joined:
        decides["joined"] = True
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
