"""`kv-memory eval` and `report`: measure how much answers lose at each keep_ratio, and compare evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kv_memory.cli.config_file import (
    ConfigOption,
    SetOption,
    Setting,
    gather_settings,
    list_settings_option,
    of_owner,
    settings_of,
)
from kv_memory.cli.options import ModelOption, command
from kv_memory.cli.output import Output
from kv_memory.cli.progress import EvalTracker
from kv_memory.config import DtypeName, Layout, StorageName, ratio_of
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import EMBEDDED
from kv_memory.model.prompts import PromptName

if TYPE_CHECKING:
    from kv_memory.compress import Adapter
    from kv_memory.evaluate import Row
    from kv_memory.evaluate.methods import RefineFrom
    from kv_memory.model.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What an evaluation compares, besides the documents of its task.

    Attributes:
        methods: full, none, random, sink_recent, attention, reconstruction, matched_score, matched_fit,
            matched_one_stage, matched_fixed_keys, matched_even_layers, matched, adapter_selection, adapter, combined or
            refined; all that can be run if empty.
        keep_ratios: Keep ratios; 1/2, 1/4, 1/8 and 1/16 if empty.
        model: A built-in model, a model folder, or a Hugging Face hub id; `embedded` is qwen-0.5b, or smollm2 if only
            that is prepared.
        adapter: A trained adapter of that model.
        prompt: Prompt form.
        dtype: Dtype of the model.
        device: Device of the model: auto (a GPU if there is one), cpu, cuda:1, ...
        layout: Positions of documents.
        storage: Type as which every compressed cache is saved and loaded before it is evaluated; auto leaves caches
            unchanged.
        refine_steps: refined: maximum number of steps.
        refine_from: refined: start from adapter, combined, matched, reconstruction, attention or sink_recent; auto is
            the adapter if there is one, otherwise matched.
        generate: Decode answers; without them evaluation is faster.
        by: One row per value of k or place (multidoc), length or kind (ruler); others are averaged. k, or length and
            kind, if empty.
        out: Folder for the results; the same command resumes from them.
        time_limit_s: Time in seconds after which measuring stops.
    """

    methods: tuple[str, ...] = ()
    keep_ratios: tuple[float, ...] = ()
    model: str = EMBEDDED
    adapter: Path | None = None
    prompt: PromptName = "auto"
    dtype: DtypeName = "auto"
    device: str = "auto"
    layout: Layout = "source"
    storage: StorageName = "auto"
    refine_steps: int = 48
    refine_from: str = "auto"
    generate: bool = True
    by: tuple[str, ...] = ()
    out: Path | None = None
    time_limit_s: float | None = None


def _known() -> dict[str, Setting]:
    from kv_memory.evaluate import TaskSettings

    return settings_of(EvalOptions, TaskSettings)


@command(json_help="Print one JSON object per line, one for each row.")
def evaluate_task(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="squad, quality, squality, needle, spans, multidoc, ruler or qa.")
    ],
    questions: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="qa: your own questions, one JSON object per line: {context, question, answer}, or {document, "
            "question, answer} with --documents. An answer may be a list of accepted answers.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="full, none, matched, reconstruction, adapter, ...; repeatable.  [default: all that can be run]",
        ),
    ] = None,
    keep_ratios: Annotated[
        list[str] | None,
        typer.Option("--keep-ratio", metavar="SHARE", help="0.25 or 1/4; repeatable.  [default: 1/2, 1/4, 1/8, 1/16]"),
    ] = None,
    model: ModelOption = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FOLDER", help="A trained adapter of that model.")
    ] = None,
    n_documents: Annotated[
        int | None,
        typer.Option(
            "--n-documents",
            metavar="N",
            help="Maximum number, with up to 5 questions each (qa: all); ruler: per kind and length.  [default: 60]",
        ),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option("--documents", metavar="FOLDER", help="qa: folder of the documents that its lines name."),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Save results here; the same command resumes from them."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", metavar="SECONDS", help="Stop measuring after this time.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    list_settings: Annotated[bool, list_settings_option(_known)] = False,
    *,
    out: Output,
) -> None:
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
    """
    options: dict[str, Any] = {
        "methods": methods or None,
        "keep_ratios": keep_ratios or None,
        "model": model,
        "adapter": adapter,
        "n_documents": n_documents,
        "questions": questions,
        "documents": documents,
        "out": out_folder,
        "time_limit_s": time_limit,
    }
    with out.working("Starting"):
        from kv_memory.compress import RefineSettings
        from kv_memory.evaluate import DEFAULT_KEEP_RATIOS, TaskSettings, evaluate
        from kv_memory.evaluate.aggregate import check_groups
        from kv_memory.evaluate.methods import check_methods
        from kv_memory.evaluate.tasks import find_task
        from kv_memory.evaluate.tasks.qa import read_questions

        known = _known()
        given = gather_settings(known, config=config, assignments=assignments or [], options=options)
        chosen = EvalOptions(**of_owner(EvalOptions, known, given))
        settings = TaskSettings(**of_owner(TaskSettings, known, given))
    out.stopped = "Nothing was saved; pass --out FOLDER to be able to resume."
    if chosen.out is not None:
        out.stopped = f"The results so far are in {chosen.out}; run the same command to resume."
    # Checked before the model is loaded, so that a typo fails at once.
    find_task(task)
    check_groups(task, chosen.by)
    check_methods(chosen.methods or None, has_adapter=chosen.adapter is not None, refine_from=chosen.refine_from)
    if task == "qa":
        read_questions(settings)
    elif settings.questions is not None:
        raise ConfigError("only qa takes a file of questions", where=task, next_step="kv-memory eval qa FILE")
    refine = RefineSettings(steps=chosen.refine_steps)
    backbone, loaded = _load(out, chosen)
    with EvalTracker(out) as tracker:
        result = evaluate(
            task,
            backbone=backbone,
            methods=chosen.methods or None,
            keep_ratios=chosen.keep_ratios or DEFAULT_KEEP_RATIOS,
            adapter=loaded,
            settings=settings,
            refine=refine,
            refine_from=cast("RefineFrom", chosen.refine_from),
            layout=chosen.layout,
            storage=chosen.storage,
            generate=chosen.generate,
            by=chosen.by or None,
            out=chosen.out,
            time_limit_s=chosen.time_limit_s,
            on_progress=tracker,
        )
    print_rows(out, result.rows)
    if not result.complete:
        again = "pass --out FOLDER to be able to resume" if chosen.out is None else "run the same command to resume"
        done = f"{result.n_finished} of {result.n_documents} documents finished"
        out.note(f"Stopped by the time limit, {done}; {again}.")


def _load(out: Output, chosen: EvalOptions) -> tuple[Backbone, Adapter | None]:
    with out.working(f"Loading the model ({chosen.model})"):
        from kv_memory.compress import Adapter
        from kv_memory.model.backbone import Backbone

        backbone = Backbone.load(chosen.model, dtype=chosen.dtype, device=chosen.device, prompt=chosen.prompt)
        return backbone, None if chosen.adapter is None else Adapter.load(chosen.adapter, backbone)


def print_rows(out: Output, rows: Sequence[Row]) -> None:
    """Print the rows as a table, or with `--json` as one object per line."""
    if out.as_json:
        for row in rows:
            print(json.dumps(row.to_dict(), ensure_ascii=False))
        return
    from kv_memory.evaluate.report import cells

    tasks = list(dict.fromkeys(row.task for row in rows))
    for task in tasks:
        if len(tasks) > 1:
            out.line(task, style="bold")
        header, *lines = cells([row for row in rows if row.task == task])
        out.table(header, lines, right=header[2:])


@command(json_help="Print one JSON object per line, one for each row.")
def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Folders of `eval --out` or of benchmarks/peers. LABEL=FOLDER labels the adapter in the table.",
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Write tables.md and the plots here.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="NAME", help="Only this method, by its name in the table; repeatable."),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None, typer.Option("--keep-ratio", metavar="SHARE", help="Only this ratio, e.g. 1/8; repeatable.")
    ] = None,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="Use all documents of each row, not only those that all rows have.")
    ] = False,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="NAME",
            help="One row per value of k or place (multidoc), length or kind (ruler); repeatable; others are averaged. "
            " [default: k; length and kind]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the intervals.")] = 0,
    *,
    out: Output,
) -> None:
    """Make one table from several evaluations, and plot it.

    Rows are compared on the documents that all of them have.
    """
    ratios = [ratio_of(text) for text in keep_ratio or ()] or None
    with out.working("Reading"):
        from kv_memory.evaluate import load_rows, write_report

        files: list[Path] = []
        chosen: dict[str, Any] = {
            "methods": method or None,
            "keep_ratios": ratios,
            "paired": not unpaired,
            "by": by,
        }
        loaded = load_rows(paths, seed=seed, **chosen)
        if to is not None:
            files = write_report(loaded, to)
    print_rows(out, loaded.rows)
    for file in files:
        out.note(f"Wrote {file}")
