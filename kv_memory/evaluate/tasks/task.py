"""The base of all tasks: their settings, and the choice and truncation of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kv_memory.config import check_choice
from kv_memory.datasets import Example
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.cases import Case, Query
from kv_memory.model.backbone import Backbone

ScoreName = Literal["f1", "accuracy", "rouge_l", "contains"]
Distractors = Literal["other", "same"]
RulerKind = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words"
]
ROOM_TOKENS = 1024  # reserved in the window for a question with its answer, and for a selector's own prompt
MAX_QUESTIONS = 5  # per document: more add little information


def room_for_document(backbone: Backbone, n_documents: int = 1) -> int:
    """Length in tokens of the longest document such that `n_documents`, the prefix, question and answer fit."""
    return (backbone.context_window - len(backbone.prefix_ids) - ROOM_TOKENS) // n_documents


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Selection of documents, and for needle, spans, multidoc and ruler their generation.

    Attributes:
        n_documents: Largest number of documents; for multidoc of passages with questions, for ruler of documents per
            kind and length. needle ignores it.
        min_tokens: Lower bound of the length; shorter documents are left out. Defaults to no bound, and to 128 for
            spans.
        max_tokens: Upper bound of the length; longer documents are left out, or truncated for QuALITY, SQuALITY and
            qa. Defaults to the size of the window.
        seed: Random seed of needles, spans, distractors and ruler's documents. Other documents are chosen by the hash
            of their ids.
        data: Folder of the sets; None means the environment's, see `read_examples`.
        corpus: spans: names of sets, or paths.
        held_out: spans: share of documents that `split_by_hash` holds out of training; only these are used.
        haystack: needle, ruler: folder or archive of texts; None means the essays of the data folder.
        lengths: needle, ruler: lengths of the documents in tokens; None means the task's own.
        depths: needle: positions of the needle, 0 at the beginning and 1 at the end.
        n_needles: needle: number of needles for each length and depth.
        k: multidoc: numbers of passages that are used together.
        n_places: multidoc: largest number of places of the passage with the answer, evenly spread from first to last;
            None means all k.
        distractors: multidoc: source of the other passages, `other` articles or the `same` one.
        kinds: ruler: kinds of documents; None means all.
        questions: qa: file of JSON lines, see `read_questions`.
        documents: qa: folder of the documents that its lines name.
    """

    n_documents: int = 60
    min_tokens: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    data: Path | None = None
    corpus: tuple[str, ...] = ()
    held_out: float | None = None
    haystack: Path | None = None
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    n_needles: int = 4
    k: tuple[int, ...] = (1, 2, 3, 5, 10)
    n_places: int | None = None
    distractors: Distractors = "other"
    kinds: tuple[RulerKind, ...] | None = None
    questions: Path | None = None
    documents: Path | None = None

    def __post_init__(self) -> None:
        low, high = self.min_tokens or 1, self.max_tokens
        checks = {
            "n_documents": (self.n_documents >= 1, "at least 1"),
            "min_tokens": (low >= 1, "at least 1"),
            "max_tokens": (high is None or high >= low, f"at least min_tokens ({low})"),
            "held_out": (self.held_out is None or 0 < self.held_out < 1, "between 0 and 1"),
            "lengths": (self.lengths is None or min(self.lengths, default=0) >= 32, "at least 32 tokens each"),
            "depths": (bool(self.depths) and all(0 <= depth <= 1 for depth in self.depths), "in [0, 1] each"),
            "n_needles": (self.n_needles >= 1, "at least 1"),
            "k": (min(self.k, default=0) >= 1, "at least 1 passage each"),
            "n_places": (self.n_places is None or self.n_places >= 1, "at least 1"),
            "kinds": (self.kinds is None or bool(self.kinds), "at least one of them"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}", where=name)
        check_choice(self.distractors, Distractors, where="distractors")
        for kind in self.kinds or ():
            check_choice(kind, RulerKind, where="kind")

    def token_range(self, backbone: Backbone, *, least: int = 1, together: int = 1) -> tuple[int, int]:
        """Smallest and largest length of the documents to use, in tokens.

        `least` is the lower bound of the task itself; `together` documents must fit the window at once.

        Raises:
            ConfigError: The window is too small for the requested documents.
        """
        low, window = self.min_tokens or least, room_for_document(backbone, together)
        high = window if self.max_tokens is None else self.max_tokens
        if high > window or low > high:
            raise ConfigError(
                f"{'documents' if together == 1 else f'{together} documents'} of {low:,} to {high:,} tokens leave no "
                f"room for prefix, question and answer in a window of {backbone.context_window:,}",
                where="max_tokens",
                next_step=f"Set max_tokens to {window} or less."
                if window > low
                else "Use a model with a longer window.",
            )
        return low, high


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the tasks.

    Attributes:
        cases: Function that makes its documents with their questions.
        score: Main score, used for retention; None if it has none.
        max_new_tokens: Length limit of an answer, in tokens.
        kl_on: Text on which KL is measured: the full model's own greedy answer, or the reference.
        groups: Names by which its rows can be grouped, see `Case.group`.
        by: Names by which its rows are grouped by default.
        drawn: True if the seed affects the documents.
        together: True if several documents are used together. `full` is then one prefill of all texts; `full+joined`
            joins separate full caches, and every other method joins separate caches.
    """

    name: str
    cases: Callable[[Backbone, TaskSettings], list[Case]]
    score: ScoreName | None
    text_metrics: tuple[str, ...] = ()
    max_new_tokens: int = 32
    kl_on: Literal["answer", "reference"] = "answer"
    groups: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    drawn: bool = False
    together: bool = False


def queries_of(example: Example, most: int | None = MAX_QUESTIONS) -> tuple[Query, ...]:
    """The first questions about a document, with all their answers; all questions if `most` is None."""
    return tuple(
        Query(text=q.text, references=q.answers, choices=q.choices, correct=q.correct) for q in example.questions[:most]
    )


def in_hash_order(examples: Iterable[Example]) -> list[Example]:
    """Examples ordered by the SHA-256 of their ids: the first N are a sample that anybody can reproduce.

    A document that occurs twice has the same id and is taken once.
    """
    unique: dict[str, Example] = {}
    for example in examples:
        unique.setdefault(example.id, example)
    return sorted(unique.values(), key=lambda example: hashlib.sha256(example.id.encode()).hexdigest())


def choose(
    examples: Iterable[Example],
    backbone: Backbone,
    settings: TaskSettings,
    *,
    what: str,
    least: int = 1,
    together: int = 1,
    cut_long: bool = False,
) -> list[Example]:
    """The first documents of a suitable length, in the order of `in_hash_order`; `cut_long` truncates longer ones.

    `least` is the lower bound of the task itself in tokens, `together` the number of documents that are used together,
    and `what` the name of the set, for the error.

    Raises:
        ConfigError: The window is too small for the requested documents.
        DatasetError: No document has a suitable length.
    """
    low, high = settings.token_range(backbone, least=least, together=together)
    chosen: list[Example] = []
    for example in in_hash_order(examples):
        if len(chosen) == settings.n_documents:
            break
        (n_tokens,) = backbone.count_tokens([example.context])
        if low <= n_tokens <= high:
            chosen.append(example)
        elif n_tokens > high and cut_long:
            chosen.append(replace(example, context=cut(backbone, example.context, high)))
    if not chosen:
        raise DatasetError(
            f"no document of {low:,} to {high:,} tokens with questions",
            where=what,
            next_step="Change min_tokens and max_tokens, or choose another set.",
        )
    return chosen


def cut(backbone: Backbone, text: str, n_tokens: int) -> str:
    """The beginning of a text, of at most `n_tokens` tokens."""
    offsets = backbone.encode_with_offsets(text)[1]
    return text if len(offsets) <= n_tokens else text[: offsets[n_tokens - 1][1]].rstrip()
