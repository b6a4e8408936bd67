"""`kv-memory train`: trains an adapter for a model on sets of questions, or for a corpus of documents."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kv_memory.cli.config_file import Given, Setting, list_settings_option, settings_of
from kv_memory.cli.options import command
from kv_memory.cli.output import Name, Output, size_text, time_text
from kv_memory.cli.progress import track_train

if TYPE_CHECKING:
    from kv_memory.train import Estimate, TrainReport


def _known() -> dict[str, Setting]:
    from kv_memory.train import RunOptions, TrainRun, TrainSettings

    without = ("out", "changes", "options", "command", "fit_steps")
    return settings_of(TrainRun, RunOptions, TrainSettings, without=without)


@command()
def train(
    out_folder: Path,
    *,
    data: list[str] | None = None,
    corpus: Path | None = None,
    model: str | None = None,
    init: Path | None = None,
    steps: int | None = None,
    time_limit: float | None = None,
    given: Given,
    resume: bool = False,
    dry_run: bool = False,
    list_settings: Annotated[bool, list_settings_option(_known)] = False,
    out: Output,
) -> Any:
    """Train an adapter: a scorer that selects the entries to keep, and a LoRA that packs the rest into those.

    The teacher is the model with the whole document in its cache; the student is the same model with a distilled
    cache. First the scorer learns alone, from attention, then both by distillation. Any supported model works, on a
    CPU or a GPU; for several GPUs run `accelerate launch $(which kv-memory) train ...`.

    With --set preset=restore it trains restore tokens instead: a few learned tokens behind each document that compete
    with its own for the cache, where the selector `matched` chooses and fits.

    With --corpus the adapter is fitted to one set of documents, which then needs far smaller caches. Start from a
    general adapter (--init). A fifth of the documents is held out and listed in OUT/held_out.json.

    Start with --dry-run. A run that was stopped or killed resumes with --resume, to the same result. OUT contains
    log.jsonl, loss.png, checkpoints, and at the end the adapter with a model card.

    Often set: eval_every (steps between evaluations), max_tokens (longest document), min_ratio and max_ratio (the keep
    ratios that are drawn), lr_lora, seed, accumulate, gradient_checkpointing (much less memory), device.
    --list-settings prints all.

    Options:
        out_folder (OUT): The run's folder; the adapter is OUT/adapter.
        data (NAME[:SHARE]): squad, dolly, fairytaleqa, squality, hf:owner/name, or a path: JSON lines of {context,
            question, answer}, text, Markdown. Repeatable; :0.5 takes half of the examples.
        corpus (PATH): Adapt to these documents; the model writes questions itself.
        model (NAME): A built-in model, a model folder, or a Hugging Face hub id.  [default: qwen-0.5b, or smollm2 if
            only that is prepared]
        init (ADAPTER): Adapter to train further; its form is kept.
        steps (N): Steps of distillation.  [default: 3000, or what --time-limit allows]
        time_limit (SECONDS): Stop after this time. Without --steps, plan steps to fit.
        resume: Resume from the newest checkpoint, with otherwise the same options.
        dry_run: Measure a few steps and estimate time and memory; write nothing.
    """
    out.stopped = "Nothing was written; run the same command again."
    with out.working("Starting"):
        from kv_memory.train import Estimate, OpenRun, RunOptions, TrainRun, TrainSettings

        found = given.gather(
            _known(), data=data, corpus=corpus, model=model, init=init, steps=steps, time_limit_s=time_limit
        )
        changes, options = found[TrainSettings], found[RunOptions]
        fits = options.get("time_limit_s") is not None and "steps" not in changes
        run = TrainRun(
            out=out_folder,
            changes=changes,
            options=RunOptions(**options, fit_steps=fits),
            command=shlex.join(["kv-memory", *sys.argv[1:]]),
            **found[TrainRun],
        )
    try:
        with track_train(out) as tracker:
            opened = OpenRun(
                run,
                resume=resume,
                dry_run=dry_run,
                on_note=out.note,
                on_passage=lambda *done: tracker.show("writing questions about passages", *done),
                on_progress=tracker,
            )
            done = opened.estimate() if dry_run else opened.train()
    except KeyboardInterrupt:
        if not dry_run:
            out.stopped = _kept(out_folder)
        raise
    out.table(("", ""), _estimate_rows(done) if isinstance(done, Estimate) else _report_rows(done))
    return done


def _kept(folder: Path) -> str:
    """What is left of a run that was stopped, and how it goes on."""
    from kv_memory.train.checkpoints import Checkpoints

    if steps := Checkpoints(folder / "checkpoints").steps():
        return f"The checkpoint of step {max(steps):,} is kept; run the same command with --resume to continue."
    questions = "The questions written so far are kept; " if (folder / "questions.jsonl").is_file() else ""
    return f"{questions or 'There is no checkpoint yet; '}run the same command again."


def _estimate_rows(e: Estimate) -> list[tuple[str, str]]:
    rows = [("Questions about the corpus", time_text(e.questions_s))] if e.questions_s else []
    if e.warmup_steps:
        rows.append(("Warm-up", f"{e.warmup_steps:,} steps of {e.warmup_step_s:.2f} s"))
    return [
        *rows,
        ("Distillation", f"{e.steps:,} steps of {e.step_s:.2f} s"),
        ("Total time", f"{time_text(e.total_s + e.questions_s)}, without evaluation"),
        ("Speed", f"{e.tokens_per_s:,.0f} tokens/s"),
        ("Peak memory", size_text(e.peak_memory_bytes)),
        ("Trained", f"{e.n_parameters:,} parameters"),
        ("Adapter", size_text(e.adapter_bytes)),
        ("Each checkpoint", size_text(e.checkpoint_bytes + e.adapter_bytes)),
    ]


def _report_rows(r: TrainReport) -> list[tuple[str, str]]:
    rows = [
        ("Adapter", Name(r.adapter)),
        ("Steps", f"{r.step:,} of {r.n_steps:,}" + (f"; the best was {r.best_step:,}" if r.best_step < r.step else "")),
        ("Time", f"{time_text(r.elapsed_s)}, {r.n_tokens:,} tokens"),
    ]
    if r.loss is not None:
        rows.append(("Loss", f"{r.loss:.4f}, the mean over the last steps"))
    for ratio, kl in (r.kl or {}).items():
        beside = f"; selection without training {r.baseline[ratio]:.3f}" if r.baseline else ""
        beside += f", no document {r.none:.3f}" if r.none is not None else ""
        rows.append((f"KL at {ratio:g}", f"{kl:.3f}{beside}"))
    return rows
