"""A complete training job, as run by `kv-memory train`: model, data, trainer and model card, from their names."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kv_memory.compress.adapter import Adapter
from kv_memory.config import DtypeName, check_choice
from kv_memory.datasets import Example, read_examples
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import EMBEDDED
from kv_memory.model.prompts import PromptName
from kv_memory.train.adapters import fit_settings, new_adapter
from kv_memory.train.card import write_card
from kv_memory.train.checkpoints import Checkpoints
from kv_memory.train.data import LICENCES, Source, hold_out, read_sources
from kv_memory.train.estimate import Estimate, fit_steps
from kv_memory.train.processes import local_device, make_accelerator
from kv_memory.train.questions import QuestionWriter
from kv_memory.train.settings import TrainSettings
from kv_memory.train.state import RunOptions, TrainProgress, TrainReport
from kv_memory.train.trainer import Trainer, already_there
from kv_memory.train.tuning import Corpus, Window, cut_corpus, domain_settings

__all__ = ["Job", "OpenJob"]

_TRIED = 2  # number of passages for which a dry run writes questions


@dataclass(frozen=True, kw_only=True)
class Job:
    """Description of a training job.

    Attributes:
        out: Folder of the run.
        sources: Data sets to train on.
        corpus: Documents for domain tuning: a path or the name of a data set.
        model: Name or path of the model, as for `Backbone.load`.
        init: Adapter to train further.
        settings: Settings of the run. Values for a corpus or from `init` replace those that are not in `given`.
        given: Settings that the user chose explicitly, by name.
        options: Options that do not affect the result of a step.
        eval_data: Data set for evaluation; documents held out of the training data if None.
        eval_documents: Number of documents to evaluate on.
        n_questions: Number of questions to write about each passage of a corpus.
        question_passages: Number of the corpus's passages to write questions about, drawn by their hash; all if None.
            The other passages are trained on by repeating and continuing spans of them, which needs no preparation.
        skip_errors: Skip broken records instead of raising.
        prompt: Prompt form, see `Backbone`.
        dtype: Dtype of the model, see `Backbone.load`.
        device: Device of the model, see `Backbone.load`.
        command: Command line, for the model card.
    """

    out: Path
    sources: tuple[Source, ...] = ()
    corpus: Path | str | None = None
    model: str = EMBEDDED
    init: Path | None = None
    settings: TrainSettings = field(default_factory=TrainSettings)
    given: Mapping[str, Any] = field(default_factory=dict)
    options: RunOptions = field(default_factory=RunOptions)
    eval_data: str | None = None
    eval_documents: int = 24
    n_questions: int = 8
    question_passages: int | None = None
    skip_errors: bool = False
    prompt: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    command: str = ""

    def __post_init__(self) -> None:
        if not self.sources and self.corpus is None:
            raise ConfigError("nothing to train on", where="data", next_step="Pass a data set or a corpus.")
        if self.eval_documents < 1:
            raise ConfigError(f"eval_documents must be at least 1, got {self.eval_documents}", where="eval_documents")
        if self.question_passages is not None and self.question_passages < 0:
            raise ConfigError(
                f"question_passages must not be negative, got {self.question_passages}", where="question_passages"
            )
        check_choice(self.prompt, PromptName, where="prompt")
        check_choice(self.dtype, DtypeName, where="dtype")


class OpenJob:
    """A job with its model loaded and its data read.

    Args:
        job: Description of the job.
        resume: Resume from the newest checkpoint.
        dry_run: Write nothing; only `estimate` may be called.
        on_note: Callback for messages to the user.
        on_passage: Callback for each passage with written questions, see `QuestionWriter.write`.
        on_progress: Callback after each step, see `Trainer`.

    Attributes:
        questions_s: Estimated seconds for writing the questions about a corpus; 0 unless `dry_run`.

    Raises:
        KVMemoryError: A data set, the model or the adapter to train further is missing or unreadable; or the folder
            already contains a run. Only questions about a corpus may have been written by then.
    """

    def __init__(
        self,
        job: Job,
        *,
        resume: bool = False,
        dry_run: bool = False,
        on_note: Callable[[str], None] = lambda _: None,
        on_passage: Callable[[int, int], None] | None = None,
        on_progress: Callable[[TrainProgress], None] | None = None,
    ) -> None:
        self._job = job
        self._resume = resume
        self._dry_run = dry_run
        self._on_note = on_note
        self._on_passage = on_passage
        self.questions_s = 0.0
        if not resume and not dry_run and Checkpoints(job.out / "checkpoints").steps():
            raise already_there(job.out)
        # Cheap checks come first: data, then the model, then hours of work.
        examples, measured, pages = self._read()
        self._backbone = Backbone.load(
            job.model,
            dtype=job.dtype,  # type: ignore[arg-type]  # both checked by Job
            device=local_device(job.device),
            prompt=job.prompt,  # type: ignore[arg-type]
        )
        settings = job.settings if job.corpus is None else domain_settings(job.settings, given=list(job.given))
        if job.init is not None:
            adapter = Adapter.load(job.init, self._backbone)
            settings = fit_settings(settings, adapter, given=job.given)
        else:
            adapter = new_adapter(self._backbone, settings)
        self._accelerator = make_accelerator(self._backbone.device)
        if pages:
            tuned, kept_out = self._tune(cut_corpus(pages, self._backbone, window_tokens=settings.max_tokens))
            examples += tuned
            measured = measured or kept_out
        self._trainer = Trainer(
            adapter,
            examples,
            settings=settings,
            out=job.out,
            options=job.options,
            held_out=measured,
            on_progress=on_progress,
        )

    def estimate(self) -> Estimate:
        """Estimate the cost of the run; nothing is written."""
        options, estimate = self._job.options, self._trainer.estimate()
        if options.fit_steps and options.time_limit_s is not None:
            fitted = fit_steps(self._trainer.settings, estimate, time_limit_s=options.time_limit_s)
            total_s = fitted.warmup_steps * estimate.warmup_step_s + fitted.steps * estimate.step_s
            estimate = replace(estimate, warmup_steps=fitted.warmup_steps, steps=fitted.steps, total_s=total_s)
        return replace(estimate, questions_s=self.questions_s)

    def run(self) -> TrainReport:
        """Train, and write the model card; errors as in `Trainer.run`."""
        report = self._trainer.run(resume=self._resume)
        job = self._job
        if self._accelerator.is_main_process:
            data = [(str(source), LICENCES.get(source.name)) for source in job.sources]
            if job.corpus is not None:
                data.append((f"documents of {Path(job.corpus).name}, questions written by the model", None))
            begun_from = None if job.init is None else str(job.init)
            write_card(report, self._backbone, command=job.command, data=data, begun_from=begun_from)
        return report

    def _read(self) -> tuple[list[Example], list[Example], list[Example]]:
        """Training examples, evaluation examples, and the pages of the corpus."""
        job, skipped = self._job, 0
        on_error: Any = "skip" if job.skip_errors else "raise"

        def on_skip(message: str) -> None:
            nonlocal skipped
            skipped += 1
            if skipped <= 5:
                self._on_note(f"Skipped: {message}")

        examples = read_sources(job.sources, seed=job.settings.seed, on_error=on_error, on_skip=on_skip)
        measured: list[Example] = []
        if job.options.eval_every and job.eval_data is not None:
            found = list(read_examples(job.eval_data, split="dev", on_error=on_error, on_skip=on_skip))
            contexts = {example.context for example in examples}
            measured = hold_out([e for e in found if e.context not in contexts], job.eval_documents, most=1.0)[1]
        elif job.options.eval_every and job.corpus is None:
            examples, measured = hold_out(examples, job.eval_documents)
        pages: list[Example] = []
        if job.corpus is not None:
            pages = list(read_examples(job.corpus, on_error=on_error, on_skip=on_skip))
        if skipped > 5:
            self._on_note(f"Skipped: {skipped - 5} more.")
        return examples, measured, pages

    def _tune(self, corpus: Corpus) -> tuple[list[Example], list[Example]]:
        """Windows with questions: for training, and for evaluation from held-out pages."""
        job = self._job
        cpu = self._backbone.device.type == "cpu"
        writer = QuestionWriter(
            self._backbone,
            n_questions=job.n_questions,
            answer_tokens=job.settings.answer_tokens,
            seed=job.settings.seed,
            batch_passages=1 if cpu else 16,
        )
        if self._dry_run:
            passages = self._chosen(corpus.passages)
            begin_s = time.monotonic()
            writer.write(passages[:_TRIED])
            self.questions_s = (time.monotonic() - begin_s) / max(1, len(passages[:_TRIED])) * len(passages)
            return [window.example for window in corpus.train], []
        measured = corpus.held_out[: job.eval_documents] if job.options.eval_every else ()
        with self._accelerator.main_process_first():  # the others read them from the file
            train = self._asked(writer, corpus.train, self._on_passage)
            held_out = self._asked(writer, measured, None)
        if self._accelerator.is_main_process:
            job.out.mkdir(parents=True, exist_ok=True)
            (job.out / "held_out.json").write_text(json.dumps(corpus.held_out_ids, indent=2) + "\n", encoding="utf-8")
        return [e for part in train for e in part], [part[0] for part in held_out]

    def _asked(
        self, writer: QuestionWriter, windows: tuple[Window, ...], on_passage: Callable[[int, int], None] | None
    ) -> list[list[Example]]:
        """The examples of each window."""
        passages = self._chosen([passage for window in windows for passage in window.passages])
        path = self._job.out / "questions.jsonl"
        written = dict(zip(passages, writer.write(passages, path=path, on_passage=on_passage), strict=True))
        return [window.examples([written.get(passage, ()) for passage in window.passages]) for window in windows]

    def _chosen(self, passages: list[str]) -> list[str]:
        """The passages to write questions about; a smaller selection is a subset of a larger one."""
        most = self._job.question_passages
        if most is None:
            return passages
        digest = {passage: hashlib.sha256(passage.encode()).digest() for passage in passages}
        return sorted(digest, key=digest.__getitem__)[:most]
