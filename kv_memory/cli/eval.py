"""`kv-memory eval` and `report`: measure how much answers lose at each keep_ratio, and compare evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kv_memory.cli.config_file import Given, Setting, list_settings_option, settings_of
from kv_memory.cli.options import command
from kv_memory.cli.output import Output
from kv_memory.cli.progress import count_text, track_eval
from kv_memory.config import ratio_of
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import EMBEDDED

if TYPE_CHECKING:
    from kv_memory.evaluate import Row


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of an evaluation besides the arguments of `Backbone.load` and `evaluate`, and the task's documents.

    Attributes:
        model: A built-in model, a model folder, or a Hugging Face hub id; `embedded` is qwen-0.5b, or smollm2 if only
            that is prepared.
        adapter: A trained adapter of that model.
        refine_steps: refined: maximum number of steps.
    """

    model: str = EMBEDDED
    adapter: Path | None = None
    refine_steps: int = 48


def _known() -> dict[str, Setting]:
    from kv_memory.evaluate import TaskSettings, evaluate
    from kv_memory.model.backbone import Backbone

    without = ("task", "backbone", "settings", "refine", "on_progress", "name")
    return settings_of(evaluate, Backbone.load, TaskSettings, EvalOptions, without=without)


@command(json_lines="one for each row")
def evaluate_task(
    task: str,
    questions: Path | None = None,
    *,
    method: list[str] | None = None,
    keep_ratio: list[str] | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    n_documents: int | None = None,
    documents: Path | None = None,
    out_: Path | None = None,
    time_limit: float | None = None,
    given: Given,
    list_settings: Annotated[bool, list_settings_option(_known)] = False,
    out: Output,
) -> Any:
    """Measure what answers lose when documents are compressed.

    The same model answers the same questions from the full cache, without the document, and from what each method
    keeps. kl and nll are in nats per token: kl is the divergence from the full cache on its own answers, nll the
    negative log-likelihood of the reference answer. retention is the share of the score between none and full that
    remains.

    Tasks: squad (questions about a paragraph), quality (multiple choice about a story), squality (summaries),
    needle (a sentence in a haystack), spans (the words of the document itself; for any corpus), multidoc (a question
    about one of k passages in the same context), ruler (RULER's synthetic tasks), qa (your own questions).

    Often set: min_tokens and max_tokens (length of documents), corpus (spans), lengths (needle, ruler), k (multidoc),
    by (rows of multidoc and ruler), generate (false is faster), storage, seed, data (folder of the data sets, instead
    of KV_MEMORY_DATA), device. --list-settings prints all.

    Options:
        task (TASK): squad, quality, squality, needle, spans, multidoc, ruler or qa.
        questions ([FILE]): qa: your own questions, one JSON object per line: {context, question, answer}, or {document,
            question, answer} with --documents. An answer may be a list of accepted answers.
        method (NAME): full, none, matched, reconstruction, adapter, ...; repeatable.  [default: all that can be run]
        keep_ratio (SHARE): 0.25 or 1/4; repeatable.  [default: 1/2, 1/4, 1/8, 1/16]
        model (NAME): A built-in model, a model folder, or a Hugging Face hub id.  [default: qwen-0.5b, or smollm2 if
            only that is prepared]
        adapter (FOLDER): A trained adapter of that model.
        n_documents (N): Maximum number, with up to 5 questions each (qa: all); ruler: per kind and length.
            [default: 60]
        documents (FOLDER): qa: folder of the documents that its lines name.
        out_ (FOLDER): Save results here; the same command resumes from them.
        time_limit (SECONDS): Stop measuring after this time.
    """
    with out.working("Starting"):
        from kv_memory.compress import RefineSettings
        from kv_memory.evaluate import TaskSettings, evaluate
        from kv_memory.evaluate.aggregate import check_groups
        from kv_memory.evaluate.methods import check_methods
        from kv_memory.evaluate.tasks import find_task
        from kv_memory.evaluate.tasks.qa import read_questions
        from kv_memory.model.backbone import Backbone

        found = given.gather(
            _known(),
            methods=method,
            keep_ratios=keep_ratio,
            model=model,
            adapter=adapter,
            n_documents=n_documents,
            questions=questions,
            documents=documents,
            out=out_,
            time_limit_s=time_limit,
        )
        chosen, settings = EvalOptions(**found[EvalOptions]), TaskSettings(**found[TaskSettings])
        options = found[evaluate]
    folder, again = options.get("out"), "run the same command to resume"
    out.stopped = f"The results so far are in {folder}; {again}."
    if folder is None:
        again = "pass --out FOLDER to be able to resume"
        out.stopped = f"Nothing was saved; {again}."
    # Checked before the model is loaded, so that a typo fails at once.
    find_task(task)
    check_groups(task, options.get("by", ()))
    has_adapter, refine_from = chosen.adapter is not None, options.get("refine_from", "auto")
    check_methods(options.get("methods"), has_adapter=has_adapter, refine_from=refine_from)
    if task == "qa":
        read_questions(settings)
    elif settings.questions is not None:
        raise ConfigError("only qa takes a file of questions", where=task, next_step="kv-memory eval qa FILE")
    refine = RefineSettings(steps=chosen.refine_steps)
    with out.working(f"Loading the model ({chosen.model})"):
        from kv_memory.compress import Adapter

        backbone = Backbone.load(chosen.model, **found[Backbone.load])
        adapter_ = None if chosen.adapter is None else Adapter.load(chosen.adapter, backbone)
    measured = {"backbone": backbone, "adapter": adapter_, "settings": settings, "refine": refine, **options}
    try:
        with track_eval(out) as tracker:
            result = evaluate(task, on_progress=tracker, **measured)
    except KeyboardInterrupt:
        if folder is not None:
            from kv_memory.evaluate.question_records import FILE_NAME

            file = folder / FILE_NAME
            n_kept = len(file.read_bytes().splitlines()) if file.is_file() else 0
            out.stopped = f"{count_text(n_kept, 'result')} kept in {folder}; {again}."
        raise
    _print(out, result.rows)
    if not result.complete:
        done = f"{result.n_finished} of {result.n_documents} documents finished"
        out.note(f"Stopped by the time limit, {done}; {again}.")
    return [row.to_dict() for row in result.rows]


def _print(out: Output, rows: Sequence[Row]) -> None:
    from kv_memory.evaluate.report import cells

    tasks = list(dict.fromkeys(row.task for row in rows))
    for task in tasks:
        if len(tasks) > 1:
            out.line(task, style="bold")
        header, *lines = cells([row for row in rows if row.task == task])
        out.table(header, lines, right=header[2:])


@command(json_lines="one for each row")
def report(
    paths: list[str],
    *,
    to: Path | None = None,
    method: list[str] | None = None,
    keep_ratio: list[str] | None = None,
    unpaired: bool = False,
    by: list[str] | None = None,
    seed: int = 0,
    out: Output,
) -> Any:
    """Make one table from several evaluations, and plot it.

    Rows are compared on the documents that all of them have.

    Options:
        paths (PATH...): Folders of `eval --out` or of benchmarks/peers. LABEL=FOLDER labels the adapter in the table.
        to (FOLDER): Write tables.md and the plots here.
        method (NAME): Only this method, by its name in the table; repeatable.
        keep_ratio (SHARE): Only this ratio, e.g. 1/8; repeatable.
        unpaired: Use all documents of each row, not only those that all rows have.
        by (NAME): One row per value of k or place (multidoc), length or kind (ruler); repeatable; others are averaged.
            [default: k; length and kind]
        seed (N): Seed of the intervals.
    """
    ratios = [ratio_of(text) for text in keep_ratio or ()] or None
    with out.working("Reading"):
        from kv_memory.evaluate import load_rows, write_report

        loaded = load_rows(
            paths, seed=seed, methods=method or None, keep_ratios=ratios, paired=not unpaired, by=by or None
        )
        files = [] if to is None else write_report(loaded, to)
    _print(out, loaded.rows)
    for file in files:
        out.note(f"Wrote {file}")
    return [row.to_dict() for row in loaded.rows]
