"""Questions by people: the paper's sets SQuAD, QuALITY and SQuALITY, and qa, the user's own questions."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kv_memory.datasets import Example, Question, read_examples
from kv_memory.datasets.example import content_id
from kv_memory.datasets.record_files import Faults, bare_name, json_lines, text_of
from kv_memory.datasets.sets import question_of
from kv_memory.documents import read_file
from kv_memory.errors import BrokenLineError, ConfigError, DatasetError, DocumentError
from kv_memory.evaluate.cases import Case
from kv_memory.evaluate.metrics import check_rouge
from kv_memory.evaluate.tasks.task import TaskSettings, choose, queries_of
from kv_memory.model.backbone import Backbone

_LOG = logging.getLogger(__name__)
_FORM = (
    "Each line is a JSON object with context, question and answer; or with document, question and answer, where "
    "document is a path in the folder given with --documents. An answer is a string, or a list of correct strings."
)


def reading_cases(name: str, backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Documents of the development set of SQuAD, QuALITY or SQuALITY, with up to five questions each.

    The stories of QuALITY and SQuALITY are truncated to the window.
    """
    if name == "squality":
        check_rouge()
    examples = read_examples(name, split="dev", data=settings.data)
    chosen = choose(examples, backbone, settings, what=name, cut_long=name != "squad")
    return [Case(id=example.id, text=example.context, queries=queries_of(example)) for example in chosen]


def qa_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Documents of a file of questions, each with all questions about it.

    Documents longer than `max_tokens`, or than the window holds, are truncated, equally for every method. Truncated
    and omitted documents are reported in a warning.

    Raises:
        ConfigError: No file is named, or the window is too small.
        DatasetError: As in `read_questions`; or no document has a suitable length.
    """
    examples = read_questions(settings)
    low, high = settings.token_range(backbone)
    chosen = choose(examples, backbone, settings, what=str(settings.questions), cut_long=True)
    if len(chosen) < len(examples):
        _LOG.warning(
            "%d of %d documents are left out; the limits are %d documents (n_documents) and at least %d tokens each "
            "(min_tokens)",
            *(len(examples) - len(chosen), len(examples), settings.n_documents, low),
        )
    whole = {example.context for example in examples}
    if n_cut := sum(example.context not in whole for example in chosen):
        _LOG.warning(
            "%d of %d documents are cut at %d tokens (max_tokens): no method, not even `full`, sees the rest",
            *(n_cut, len(chosen), high),
        )
    return [Case(id=example.id, text=example.context, queries=queries_of(example, None)) for example in chosen]


def read_questions(settings: TaskSettings) -> list[Example]:
    """The documents of `settings.questions`, each with its questions from anywhere in the file.

    A line is `{context, question, answer}`, or `{document, question, answer}` with `document` the path of a file in
    `settings.documents`. `answer` is a text, or a list of correct texts.

    Raises:
        ConfigError: No file is named.
        DatasetError: The file cannot be read, or contains no question.
        BrokenLineError: A line is broken, or its document cannot be read; the error names file and line.
    """
    if settings.questions is None:
        raise ConfigError(
            "qa needs a file of questions", where="questions", next_step="Name one: kv-memory eval qa FILE.jsonl"
        )
    source, faults = bare_name(settings.questions), Faults(on_error="raise")
    contexts: dict[str, str] = {}
    asked: dict[str, list[Question]] = {}
    try:
        for where, record in json_lines(settings.questions, faults):
            with faults.at(where):
                name, context = _document(record, source, settings.documents, contexts)
                asked.setdefault(name, []).append(question_of(record))
                contexts[name] = context
    except BrokenLineError as error:
        raise BrokenLineError(error.what, where=error.where, next_step=_FORM) from error
    if not asked:
        raise DatasetError("the file has no questions", where=str(settings.questions), next_step=_FORM)
    return [
        Example(id=name, context=contexts[name], questions=tuple(questions), source=source)
        for name, questions in asked.items()
    ]


def _document(record: Any, source: str, folder: Path | None, known: Mapping[str, str]) -> tuple[str, str]:
    """Id and text of a line's document."""
    if "document" not in record:
        if "context" not in record:
            raise DatasetError("neither a context nor a document")
        context = text_of(record, "context")
        return content_id(source, context), context
    if "context" in record:
        raise DatasetError("both a context and a document")
    name = posixpath.normpath(text_of(record, "document"))
    if name in known:
        return name, known[name]
    if folder is None:
        raise DatasetError(f"document {name!r} needs a folder, and none is given")
    if posixpath.isabs(name) or name.split("/")[0] == "..":
        raise DatasetError(f"document {name!r} is not inside {folder}")
    try:
        return name, read_file(folder / name).text.strip()
    except DocumentError as error:
        raise DatasetError(f"document {name!r}: {error.what}") from error
