"""A complete training run, as of `kv-memory train`: model, data, trainer and model card, from their names."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.config import DtypeName, check_at_least, check_choices
from kv_memory.datasets import Example, read_examples
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import EMBEDDED
from kv_memory.model.prompts import PromptName
from kv_memory.train.adapters import fit_settings, new_adapter
from kv_memory.train.checkpoints import Checkpoints
from kv_memory.train.data import LICENCES, Corpus, Window, cut_corpus, hold_out, read_sources, split_share
from kv_memory.train.estimate import Estimate
from kv_memory.train.questions import QuestionWriter
from kv_memory.train.settings import RunOptions, TrainSettings, domain_settings, preset
from kv_memory.train.train_report import TrainProgress, TrainReport, write_card
from kv_memory.train.trainer import Trainer, already_there, make_accelerator

_TRIED = 2  # number of passages for which a dry run writes questions
_SHOWN = 5  # number of skipped records that are named


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Description of a training run.

    Attributes:
        out: Folder of the run.
        data: Data sets to train on: `squad`, `dolly`, `fairytaleqa`, `squality`, `hf:owner/name`, or a path;
            `squad:0.5` takes half of the examples.
        corpus: Documents for domain tuning: a path or the name of a data set.
        model: A built-in model, a model folder, or a Hugging Face hub id; `embedded` is qwen-0.5b, or smollm2 if only
            that is prepared.
        init: Adapter to train further.
        preset: Settings to start from: `default`; `restore` for restore tokens; `paper` for KV-Distill as published.
        changes: Settings that the user chose, by the names of `TrainSettings`; all others come from the adapter to
            train further, from what suits a corpus, or from the preset, in this order.
        options: Options that do not affect the result of a step.
        eval_documents: Number of documents to evaluate on, held out of the training data.
        n_questions: Number of questions to write about each passage of a corpus.
        question_passages: Number of the corpus's passages to write questions about, drawn by their hash; all if None.
            The other passages are trained on by repeating and continuing spans of them, which needs no preparation.
        skip_errors: Skip broken records instead of raising.
        prompt: Prompt form, see `Backbone`.
        dtype: Dtype of the model, see `Backbone.load`.
        device: Device of the model: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        command: Command line, for the model card.

    Raises:
        ConfigError: A value is out of range, or there is nothing to train on.
    """

    out: Path
    data: tuple[str, ...] = ()
    corpus: Path | None = None
    model: str = EMBEDDED
    init: Path | None = None
    preset: str = "default"
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: RunOptions = field(default_factory=RunOptions)
    eval_documents: int = 24
    n_questions: int = 8
    question_passages: int | None = None
    skip_errors: bool = False
    prompt: PromptName = "auto"
    dtype: DtypeName = "auto"
    device: str = "auto"
    command: str = ""

    def __post_init__(self) -> None:
        if not self.data and self.corpus is None:
            raise ConfigError(
                "nothing to train on", where="data", next_step="Pass a data set (--data) or documents (--corpus)."
            )
        check_at_least(self, 1, "eval_documents", "n_questions")
        check_at_least(self, 0, "question_passages")
        check_choices(self)
        _ = self.settings, [split_share(text) for text in self.data]  # both raise if they are wrong

    @property
    def settings(self) -> TrainSettings:
        """The preset with the changes, and for a corpus with what suits it."""
        settings = preset(self.preset, **self.changes)
        return settings if self.corpus is None else domain_settings(settings, given=self.changes)


class OpenRun:
    """A run with its model loaded and its data read.

    With `dry_run`, nothing is written, and only `estimate` may be called. `on_note` gets messages to the user, for
    `on_passage` and `on_progress` see `QuestionWriter.write` and `Trainer`.

    Raises:
        KVMemoryError: A data set, the model or the adapter to train further is missing or unreadable; or the folder
            already contains a run. Only questions about a corpus may have been written by then.
    """

    def __init__(
        self,
        run: TrainRun,
        *,
        resume: bool = False,
        dry_run: bool = False,
        on_note: Callable[[str], None] = lambda _: None,
        on_passage: Callable[[int, int], None] | None = None,
        on_progress: Callable[[TrainProgress], None] | None = None,
    ) -> None:
        self._run = run
        self._resume = resume
        self._questions_s = 0.0
        if not resume and not dry_run and Checkpoints(run.out / "checkpoints").steps():
            raise already_there(run.out)
        # Cheap checks come first: data, then the model, then hours of work.
        examples, measured, pages = _read(run, on_note)
        self._backbone = Backbone.load(run.model, dtype=run.dtype, device=_local_device(run.device), prompt=run.prompt)
        settings = run.settings
        if run.init is None:
            adapter = new_adapter(self._backbone, settings)
        else:
            adapter = Adapter.load(run.init, self._backbone)
            settings = fit_settings(settings, adapter, given=run.changes)
        self._accelerator = make_accelerator(self._backbone.device)
        if pages:
            corpus = cut_corpus(pages, self._backbone, window_tokens=settings.max_tokens)
            writer = QuestionWriter(
                self._backbone,
                n_questions=run.n_questions,
                answer_tokens=settings.answer_tokens,
                seed=settings.seed,
                batch_passages=1 if self._backbone.device.type == "cpu" else 16,
            )
            if dry_run:
                passages = self._asked_about(corpus.train)
                begin_s = time.monotonic()
                writer.write(passages[:_TRIED])
                self._questions_s = (time.monotonic() - begin_s) / max(1, len(passages[:_TRIED])) * len(passages)
                examples += [window.example for window in corpus.train]
            else:
                tuned, kept_out = self._tune(corpus, writer, on_passage)
                examples += tuned
                measured = measured or kept_out
        self._trainer = Trainer(
            adapter,
            examples,
            settings=settings,
            out=run.out,
            options=run.options,
            held_out=measured,
            on_progress=on_progress,
        )

    def estimate(self) -> Estimate:
        """Estimate the cost of the run; nothing is written."""
        return replace(self._trainer.estimate(), questions_s=self._questions_s)

    def train(self) -> TrainReport:
        """Train, and write the model card; errors as in `Trainer.run`."""
        report, run = self._trainer.run(resume=self._resume), self._run
        if self._accelerator.is_main_process:
            data = [(text, LICENCES.get(split_share(text)[0])) for text in run.data]
            if run.corpus is not None:
                data.append((f"documents of {run.corpus.name}, questions written by the model", None))
            write_card(report, self._backbone, command=run.command, data=data, begun_from=run.init)
        return report

    def _tune(
        self, corpus: Corpus, writer: QuestionWriter, on_passage: Callable[[int, int], None] | None
    ) -> tuple[list[Example], list[Example]]:
        """Windows with questions: for training, and for evaluation from held-out pages."""
        run = self._run

        def examples(windows: Sequence[Window], on_passage: Any = None) -> list[list[Example]]:
            passages = self._asked_about(windows)
            questions = writer.write(passages, path=run.out / "questions.jsonl", on_passage=on_passage)
            written = dict(zip(passages, questions, strict=True))
            return [window.examples([written.get(passage, ()) for passage in window.passages]) for window in windows]

        with self._accelerator.main_process_first():  # the others read them from the file
            train = examples(corpus.train, on_passage)
            held_out = examples(corpus.held_out[: run.eval_documents] if run.options.eval_every else [])
        if self._accelerator.is_main_process:
            run.out.mkdir(parents=True, exist_ok=True)
            (run.out / "held_out.json").write_text(json.dumps(corpus.held_out_ids, indent=2) + "\n", encoding="utf-8")
        return [example for window in train for example in window], [window[0] for window in held_out]

    def _asked_about(self, windows: Sequence[Window]) -> list[str]:
        """The passages to write questions about; a smaller selection is a subset of a larger one."""
        passages = [passage for window in windows for passage in window.passages]
        most = self._run.question_passages
        if most is None:
            return passages
        return sorted(set(passages), key=lambda passage: hashlib.sha256(passage.encode()).digest())[:most]


def _read(run: TrainRun, on_note: Callable[[str], None]) -> tuple[list[Example], list[Example], list[Example]]:
    """Training examples, evaluation examples, and the pages of the corpus."""
    skipped: list[str] = []

    def on_skip(message: str) -> None:
        skipped.append(message)
        if len(skipped) <= _SHOWN:
            on_note(f"Skipped: {message}")

    read = partial(read_examples, on_error="skip" if run.skip_errors else "raise", on_skip=on_skip)
    examples = read_sources(run.data, seed=run.settings.seed, read=read)
    measured: list[Example] = []
    if run.options.eval_every and run.corpus is None:
        examples, measured = hold_out(examples, run.eval_documents)
    pages = [] if run.corpus is None else list(read(run.corpus))
    if len(skipped) > _SHOWN:
        on_note(f"Skipped: {len(skipped) - _SHOWN} more.")
    return examples, measured, pages


def _local_device(name: str) -> str:
    """Resolve `auto` under `accelerate launch` to this process's own GPU; other names are unchanged."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if name == "auto" and rank is not None and torch.cuda.is_available() else name
