"""`kv-memory train`: trains an adapter for a model on sets of questions, or for a corpus of documents."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kv_memory.cli.options import JsonOption
from kv_memory.cli.output import reporting, size_text
from kv_memory.cli.progress import TrainTracker
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import EMBEDDED

if TYPE_CHECKING:
    from kv_memory.train import Estimate, TrainReport, TrainSettings

__all__ = ["changes_of", "settings_of", "train"]


def train(
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The run's folder; the adapter is OUT/adapter.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME[:SHARE]",
            help="squad, dolly, fairytaleqa, squality, hf:owner/name, or a path: JSON lines of {context, question, "
            "answer}, text, Markdown. Repeatable; :0.5 takes half of the examples.",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", metavar="PATH", help="Adapt to these documents; the model writes questions itself."),
    ] = None,
    question_passages: Annotated[
        int | None,
        typer.Option(
            "--question-passages",
            metavar="N",
            help="With --corpus: write questions about this many passages; the others are repeated and continued.  "
            "[default: all]",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", metavar="NAME", help="A built-in model, a model folder, or a Hugging Face hub id."),
    ] = EMBEDDED,
    init: Annotated[
        Path | None, typer.Option("--init", metavar="ADAPTER", help="Adapter to train further; its form is kept.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset", metavar="NAME", help="default, or paper: one score per token, W_Q and W_O of kept tokens."
        ),
    ] = "default",
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", help="Steps of distillation.  [default: 3000, or what --time-limit allows]"
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            "--warmup-steps", metavar="N", help="Warm-up steps of the scorer alone.  [default: 300; 0 with --init]"
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", metavar="SECONDS", help="Stop after this time. Without --steps, plan steps to fit."
        ),
    ] = None,
    batch_documents: Annotated[
        int | None, typer.Option("--batch-documents", metavar="N", help="Documents per batch.  [default: 1]")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", metavar="N", help="Batches per step.  [default: 1]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Maximum tokens of a document; longer ones are cut.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Rank of the LoRA.")] = None,
    lr_lora: Annotated[
        float | None, typer.Option("--lr-lora", metavar="RATE", help="The LoRA's learning rate.")
    ] = None,
    lr_scorer: Annotated[
        float | None, typer.Option("--lr-scorer", metavar="RATE", help="The scorer's learning rate, in the warm-up.")
    ] = None,
    min_ratio: Annotated[
        float | None, typer.Option("--min-ratio", metavar="SHARE", help="Smallest keep ratio drawn.")
    ] = None,
    max_ratio: Annotated[
        float | None, typer.Option("--max-ratio", metavar="SHARE", help="Largest keep ratio drawn.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of all random draws.  [default: 0]")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of TrainSettings, e.g. eta=8; repeatable."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use much less memory, and a third more time.")
    ] = False,
    eval_every: Annotated[
        int, typer.Option("--eval-every", metavar="N", help="Steps between evaluations; 0 for none.")
    ] = 0,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data", metavar="NAME", help="A set to evaluate on.  [default: held out of the training data]"
        ),
    ] = None,
    eval_documents: Annotated[
        int, typer.Option("--eval-documents", metavar="N", help="Documents per evaluation.")
    ] = 24,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", metavar="N", help="Steps between checkpoints.")
    ] = 100,
    keep_checkpoints: Annotated[
        int, typer.Option("--keep-checkpoints", metavar="N", help="The newest N and the best are kept.")
    ] = 2,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Skip broken records, instead of failing at the first.")
    ] = False,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="NAME", help="Prompt form: auto, chat, brief or passage.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="The model's type: auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint, with otherwise the same options.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few steps and estimate time and memory; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter: a scorer that selects the entries to keep, and a LoRA that packs the rest into those.

    The teacher is the model with the whole document in its cache; the student is the same model with a distilled
    cache. First the scorer learns alone, from attention, then both by distillation. Any supported model works, on a
    CPU or a GPU; for several GPUs run `accelerate launch $(which kv-memory) train ...`.

    With --corpus the adapter is fitted to one set of documents, which then needs far smaller caches. Start from a
    general adapter (--init). A fifth of the documents is held out and listed in OUT/held_out.json.

    Start with --dry-run. A run that was stopped or killed resumes with --resume, to the same result. OUT contains
    log.jsonl, loss.png, checkpoints, and at the end the adapter with a model card.
    """
    with reporting(as_json=as_json) as out:
        out.stopped = "Nothing was written." if dry_run else "Run the same command with --resume to continue."
        options: dict[str, Any] = {
            "steps": steps,
            "warmup_steps": warmup_steps if warmup_steps is not None or init is None else 0,
            "batch_documents": batch_documents,
            "accumulate": accumulate,
            "max_tokens": max_tokens,
            "rank": rank,
            "lr_lora": lr_lora,
            "lr_scorer": lr_scorer,
            "min_ratio": min_ratio,
            "max_ratio": max_ratio,
            "seed": seed,
        }
        if not data and corpus is None:
            raise ConfigError(
                "nothing to train on", where="--data", next_step="Pass a data set (--data) or a --corpus."
            )
        with out.working("Starting"):
            from kv_memory.train import Job, OpenJob, RunOptions, parse_source

            changes = changes_of(options, assignments or [])
            job = Job(
                out=out_folder,
                sources=tuple(parse_source(text) for text in data or []),
                corpus=corpus,
                model=model,
                init=init,
                settings=settings_of(preset, changes),
                given=changes,
                options=RunOptions(
                    checkpoint_every=checkpoint_every,
                    keep_checkpoints=keep_checkpoints,
                    eval_every=eval_every,
                    time_limit_s=time_limit,
                    fit_steps=time_limit is not None and "steps" not in changes,
                    gradient_checkpointing=gradient_checkpointing,
                ),
                eval_data=eval_data,
                eval_documents=eval_documents,
                question_passages=question_passages,
                skip_errors=skip_errors,
                prompt=prompt,
                dtype=dtype,
                device=device,
                command=shlex.join(["kv-memory", *sys.argv[1:]]),
            )
        with TrainTracker(out) as tracker:
            opened = OpenJob(
                job,
                resume=resume,
                dry_run=dry_run,
                on_note=out.note,
                on_passage=tracker.questions,
                on_progress=tracker,
            )
            done: Estimate | TrainReport = opened.estimate() if dry_run else opened.run()
        if as_json:
            out.json(done)
        elif dry_run:
            out.table(("", ""), _estimate_rows(done))
        else:
            out.table(("", ""), _report_rows(done))


def _estimate_rows(estimate: Any) -> list[tuple[str, str]]:
    e: Estimate = estimate
    rows = [("Questions about the corpus", _time_text(e.questions_s))] if e.questions_s else []
    if e.warmup_steps:
        rows.append(("Warm-up", f"{e.warmup_steps:,} steps of {e.warmup_step_s:.2f} s"))
    return [
        *rows,
        ("Distillation", f"{e.steps:,} steps of {e.step_s:.2f} s"),
        ("Total time", f"{_time_text(e.total_s + e.questions_s)}, without evaluation"),
        ("Speed", f"{e.tokens_per_s:,.0f} tokens/s"),
        ("Peak memory", size_text(e.peak_memory_bytes)),
        ("Trained", f"{e.n_parameters:,} parameters"),
        ("Adapter", size_text(e.adapter_bytes)),
        ("Each checkpoint", size_text(e.checkpoint_bytes + e.adapter_bytes)),
    ]


def _report_rows(report: Any) -> list[tuple[str, str]]:
    r: TrainReport = report
    rows = [
        ("Adapter", str(r.adapter)),
        ("Steps", f"{r.step:,} of {r.n_steps:,}" + (f"; the best was {r.best_step:,}" if r.best_step < r.step else "")),
        ("Time", f"{_time_text(r.elapsed_s)}, {r.n_tokens:,} tokens"),
    ]
    if r.loss is not None:
        rows.append(("Loss", f"{r.loss:.4f}, the mean over the last steps"))
    for ratio, kl in (r.evaluation.kl if r.evaluation else {}).items():
        beside = f"; selection without training {r.baseline[ratio]:.3f}" if r.baseline else ""
        beside += f", no document {r.none:.3f}" if r.none is not None else ""
        rows.append((f"KL at {ratio:g}", f"{kl:.3f}{beside}"))
    return rows


def _time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def changes_of(options: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The settings that the user changes: options that were given, and `--set NAME=VALUE`.

    Args:
        options: Values by field of `TrainSettings`; None for an option that was not given.
        assignments: Strings `NAME=VALUE`, with commas between the items of a list, and `none` for None.

    Raises:
        ConfigError: An assignment is not `NAME=VALUE`, names no setting, or has a value of the wrong type.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    for text in assignments:
        name, found, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not found:
            raise ConfigError(f"--set must be NAME=VALUE, got {text!r}", where="--set", next_step="E.g. --set eta=8")
        changes[name] = _typed(name, value.strip())
    return changes


def settings_of(preset_name: str, changes: Mapping[str, Any]) -> TrainSettings:
    """The settings of a preset with changes.

    Raises:
        ConfigError: As in `preset`.
    """
    from kv_memory.train import preset

    return preset(preset_name, **changes)


def _typed(name: str, value: str) -> Any:
    from kv_memory.train import TrainSettings

    fields = {field.name: str(field.type) for field in dataclasses.fields(TrainSettings)}
    if name not in fields:
        raise ConfigError(f"unknown setting {name!r}", where="--set", next_step=f"Use one of {', '.join(fields)}.")
    kind = fields[name]  # the annotation's text, since annotations in that module are not evaluated
    if value.lower() == "none" and "None" in kind:
        return None
    try:
        if kind.startswith("tuple"):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if kind.startswith("int"):
            return int(value)
        return float(value) if kind.startswith("float") else value
    except ValueError:
        wanted = "a whole number" if kind.startswith("int") else "a number"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}", where="--set") from None
