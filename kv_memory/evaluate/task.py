"""Task: a set of documents, what is asked about them, and which measures apply; and the settings of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kv_memory.config import check_choice
from kv_memory.errors import ConfigError
from kv_memory.evaluate.cases import ROOM_TOKENS, Case
from kv_memory.model.backbone import Backbone

__all__ = ["Distractors", "RulerKind", "ScoreName", "Task", "TaskSettings", "room_for_document"]

ScoreName = Literal["f1", "accuracy", "rouge_l", "contains"]
Distractors = Literal["other", "same"]
RulerKind = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words"
]
MAX_QUESTIONS = 5  # of one document: more say little that is new


def room_for_document(backbone: Backbone, n_documents: int = 1) -> int:
    """Tokens of the longest document that, so many times, leaves room for the prefix, a question and its answer."""
    return (backbone.context_window - len(backbone.prefix_ids) - ROOM_TOKENS) // n_documents


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which documents are taken, and for needle, spans, multidoc and ruler how they are made.

    Attributes:
        n_documents: At most so many; of multidoc passages with questions, of ruler documents for each kind and length;
            needle makes its own number of them.
        min_tokens: Shorter documents are left out; by default none, and for spans those under 128.
        max_tokens: Longer ones are left out, of QuALITY, SQuALITY and qa cut; by default what the window holds.
        seed: Draws needles, spans, distractors and ruler's documents. Others are chosen by the hash of their ids.
        data: The folder of the sets; else the environment's, see `read_examples`.
        corpus: spans: names of sets, or paths.
        held_out: spans: take only the documents that `split_by_hash` holds out of training at this share.
        haystack: needle, ruler: a folder or archive of texts; the essays of the data folder if None.
        lengths: needle, ruler: lengths of the haystack in tokens; the task's own if None.
        depths: needle: where the needle lies, 0 at the beginning and 1 at the end.
        n_needles: needle: how many for each length and depth.
        k: multidoc: how many passages are read together.
        n_places: multidoc: at most so many places of the passage with the answer, evenly spread from first to last;
            all k if None.
        distractors: multidoc: the others are passages of `other` articles, or of the `same` one.
        kinds: ruler: its tasks; all if None.
        questions: qa: a file of JSON lines, see `read_questions`.
        documents: qa: the folder of the documents that its lines name.
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
        """Lengths of documents that are taken, in tokens.

        Args:
            backbone: Whose window is the limit.
            least: The task's own lower bound.
            together: How many are read together.

        Raises:
            ConfigError: The window is too small for the documents that were asked for.
        """
        low, window = self.min_tokens or least, room_for_document(backbone, together)
        high = window if self.max_tokens is None else self.max_tokens
        if high > window or low > high:
            raise ConfigError(
                f"{'documents' if together == 1 else f'{together} documents'} of {low:,} to {high:,} tokens leave no "
                f"room for prefix, question and answer in a window of {backbone.context_window:,}",
                where="max_tokens",
                next_step=f"Pass --max-tokens {window} or less." if window > low else "Use a model with more room.",
            )
        return low, high


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the tasks.

    Attributes:
        name: Of the task.
        cases: Makes its documents with their questions.
        score: Its main score, of which retention is told; None if it has none.
        text_metrics: Those of decoded answers.
        max_new_tokens: The longest answer.
        kl_on: Where KL is measured: on the full model's own greedy answer, or on the reference.
        groups: Names by which its rows can be told apart, see `Case.group`.
        by: Those by which they are told apart where nothing is said.
        drawn: Whether the seed draws something.
        together: Whether several documents are read together. `full` is then one prefill of all texts, `full+joined`
            their full caches made apart and joined, and every other method's caches are made apart and joined.
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
