"""`kv-memory eval` and `report`: measure how much answers lose at each keep_ratio, and compare evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kv_memory.cli.options import ratio_of
from kv_memory.cli.output import Output, reporting
from kv_memory.cli.progress import EvalTracker
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import EMBEDDED

if TYPE_CHECKING:
    from kv_memory.compress import Adapter
    from kv_memory.config import DtypeName, Layout, StorageName
    from kv_memory.evaluate import Evaluation, Row
    from kv_memory.evaluate.methods import RefineFrom
    from kv_memory.model.backbone import Backbone
    from kv_memory.model.prompts import PromptName

__all__ = ["BY", "evaluate_task", "print_rows", "report"]

BY = typer.Option(
    "--by",
    metavar="NAME",
    help="One row per value of k or place (multidoc), length or kind (ruler); repeatable; others are averaged.  "
    "[default: k; length and kind]",
)


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
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="full, none, random, sink_recent, attention, reconstruction, matched_score, matched_fit, "
            "matched_one_stage, matched_fixed_keys, matched_even_layers, matched, adapter_selection, "
            "adapter, combined or refined; repeatable.  [default: all that can be run]",
        ),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None,
        typer.Option("--keep-ratio", metavar="SHARE", help="0.25 or 1/4; repeatable.  [default: 1/2, 1/4, 1/8, 1/16]"),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", metavar="NAME", help="A built-in model, a model folder, or a Hugging Face hub id."),
    ] = EMBEDDED,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FOLDER", help="A trained adapter of that model.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="NAME", help="Prompt form: auto, chat, brief or passage.")
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda:1, ...")
    ] = "auto",
    layout: Annotated[
        str, typer.Option("--layout", metavar="NAME", help="Positions of documents: source or packed.")
    ] = "source",
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            metavar="NAME",
            help="Save and load every compressed cache as this type before it is evaluated: float32, bfloat16, float16 "
            "or int8; 'auto' leaves caches unchanged.",
        ),
    ] = "auto",
    n_documents: Annotated[
        int | None,
        typer.Option(
            "--n-documents",
            metavar="N",
            help="Maximum number, with up to 5 questions each (qa: all); ruler: per kind and length.  [default: 60]",
        ),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", metavar="N", help="Leave shorter documents out.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="Leave longer documents out; quality, squality and qa cut them.  [default: the model's window]",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", help="Seed of needles, spans, distractors, ruler, the random method and intervals."
        ),
    ] = 0,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus", metavar="PATH", help="spans: folders, files, archives or names of data sets; repeatable."
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option("--held-out", metavar="SHARE", help="spans: only the share of documents kept out of training."),
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(
            "--haystack",
            metavar="FOLDER",
            help="needle, ruler: texts to hide needles in.  [default: the data folder's]",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            metavar="N",
            help="needle, ruler: tokens; repeatable.  [default: 256, 512, 1024, 2048; ruler 1024, 2048]",
        ),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option("--depth", metavar="D", help="needle: in [0, 1]; repeatable.  [default: 0, 0.25, 0.5, 0.75, 1]"),
    ] = None,
    n_needles: Annotated[
        int | None,
        typer.Option("--n-needles", metavar="N", help="needle: for each length and depth.  [default: 4]"),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k", metavar="N", help="multidoc: passages per question; repeatable.  [default: 1, 2, 3, 5, 10]"
        ),
    ] = None,
    n_places: Annotated[
        int | None,
        typer.Option(
            "--n-places",
            metavar="N",
            help="multidoc: number of places of the right passage, evenly spread.  [default: all]",
        ),
    ] = None,
    distractors: Annotated[
        str,
        typer.Option("--distractors", metavar="NAME", help="multidoc: passages of other articles, or of the same one."),
    ] = "other",
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="NAME",
            help="ruler: single, multi_key, multi_value, multi_query, variable_tracking, common_words or "
            "frequent_words; repeatable.  [default: all]",
        ),
    ] = None,
    by: Annotated[list[str] | None, BY] = None,
    documents: Annotated[
        Path | None,
        typer.Option("--documents", metavar="FOLDER", help="qa: folder of the documents that its lines name."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", envvar="KV_MEMORY_DATA", metavar="FOLDER", help="Folder of the data sets."),
    ] = None,
    refine_steps: Annotated[
        int, typer.Option("--refine-steps", metavar="N", help="refined: maximum number of steps.")
    ] = 48,
    refine_from: Annotated[
        str,
        typer.Option(
            "--refine-from",
            metavar="NAME",
            help="refined: start from adapter, combined, matched, reconstruction, attention or sink_recent; auto is "
            "the adapter if there is one, otherwise matched.",
        ),
    ] = "auto",
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Decode answers; without them evaluation is faster.")
    ] = True,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Save results here; the same command resumes from them."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", metavar="SECONDS", help="Stop measuring after this time.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, one for each row.")] = False,
) -> None:
    """Measure what answers lose when documents are compressed.

    The same model answers the same questions from the full cache, without the document, and from what each method
    keeps. kl and nll are in nats per token: kl is the divergence from the full cache on its own answers, nll the
    negative log-likelihood of the reference answer. retention is the share of the score between none and full that
    remains.

    Tasks: squad (questions about a paragraph), quality (multiple choice about a story), squality (summaries),
    needle (a sentence in a haystack), spans (the words of the document itself; for any corpus), multidoc (a question
    about one of k passages in the same context), ruler (RULER's synthetic tasks), qa (your own questions).
    """
    with reporting(as_json=as_json) as out:
        out.stopped = "Nothing was saved; pass --out FOLDER to be able to resume."
        if out_folder is not None:
            out.stopped = f"The results so far are in {out_folder}; run the same command to resume."
        settings: dict[str, Any] = {
            "n_documents": n_documents,
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "seed": seed,
            "data": data,
            "corpus": tuple(corpus) if corpus else None,
            "held_out": held_out,
            "haystack": haystack,
            "lengths": tuple(length) if length else None,
            "depths": tuple(depth) if depth else None,
            "n_needles": n_needles,
            "k": tuple(k) if k else None,
            "n_places": n_places,
            "distractors": distractors,
            "kinds": tuple(kind) if kind else None,
            "questions": questions,
            "documents": documents,
        }
        ratios = [ratio_of(text) for text in keep_ratio or ()]
        with out.working("Starting"):
            from kv_memory.compress import RefineSettings
            from kv_memory.config import StorageName, check_choice
            from kv_memory.evaluate import DEFAULT_KEEP_RATIOS, TaskSettings, evaluate
            from kv_memory.evaluate.aggregate import check_groups
            from kv_memory.evaluate.methods import check_methods
            from kv_memory.evaluate.tasks import find_task
            from kv_memory.evaluate.tasks.qa import read_questions

        # Checked before the model is loaded, so that a typo fails at once.
        find_task(task)
        check_groups(task, by or ())
        check_choice(storage, StorageName, where="storage")
        check_methods(method, has_adapter=adapter is not None, refine_from=refine_from)
        chosen = TaskSettings(**{name: value for name, value in settings.items() if value is not None})
        if task == "qa":
            read_questions(chosen)
        elif questions is not None:
            raise ConfigError("only qa takes a file of questions", where=task, next_step="kv-memory eval qa FILE")
        refine = RefineSettings(steps=refine_steps)
        backbone, loaded = _load(out, model, adapter, dtype=dtype, device=device, prompt=prompt)
        with EvalTracker(out) as tracker:
            result = evaluate(
                task,
                backbone=backbone,
                methods=method,
                keep_ratios=ratios or DEFAULT_KEEP_RATIOS,
                adapter=loaded,
                settings=chosen,
                refine=refine,
                refine_from=cast("RefineFrom", refine_from),
                layout=cast("Layout", layout),
                storage=cast("StorageName", storage),
                generate=generate,
                by=by,
                out=out_folder,
                time_limit_s=time_limit,
                on_progress=tracker,
            )
        _print(out, result, out_folder)


def _load(
    out: Output, model: str, adapter: Path | None, *, dtype: str, device: str, prompt: str
) -> tuple[Backbone, Adapter | None]:
    with out.working(f"Loading the model ({model})"):
        from kv_memory.compress import Adapter
        from kv_memory.config import check_choice
        from kv_memory.model.backbone import Backbone
        from kv_memory.model.prompts import PromptName

        check_choice(prompt, PromptName, where="prompt")
        backbone = Backbone.load(
            model, dtype=cast("DtypeName", dtype), device=device, prompt=cast("PromptName", prompt)
        )
        return backbone, None if adapter is None else Adapter.load(adapter, backbone)


def _print(out: Output, result: Evaluation, folder: Path | None) -> None:
    print_rows(out, result.rows)
    if not result.complete:
        again = "run the same command to resume" if folder is not None else "pass --out FOLDER to be able to resume"
        out.note(f"Stopped by the time limit, {result.n_finished} of {result.n_documents} documents finished; {again}.")


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
    by: Annotated[list[str] | None, BY] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, one for each row.")] = False,
) -> None:
    """Make one table from several evaluations, and plot it.

    Rows are compared on the documents that all of them have.
    """
    with reporting(as_json=as_json) as out:
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
