"""The demo's measurement: each question answered from distilled caches and from text, by the same model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_memory.cli.demo_questions import Question, contains_any
from kv_memory.config import DecodeSettings

if TYPE_CHECKING:
    from kv_memory.generate import Answer, ReadFrom
    from kv_memory.memory import KVMemory

__all__ = ["Comparison", "Medians", "compare", "medians"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question, answered both ways from the same passages.

    Attributes:
        question: Text of the question.
        accepted: Strings of which a right answer contains one; empty if unknown.
        document_id: Document of the best passage; None if no passage shares a word with the question.
        caches: The answer from distilled caches.
        text: The answer with the passages' text in the prompt.
    """

    question: str
    accepted: tuple[str, ...] = ()
    document_id: str | None
    caches: Answer
    text: Answer

    @property
    def ttft_ratio(self) -> float | None:
        """Time to first token from text divided by that from caches; None if there was nothing to answer from."""
        return self.text.ttft_s / self.caches.ttft_s if self.document_id is not None else None

    def is_right(self, answer: Answer) -> bool | None:
        """Whether one of the two answers is right; None if the right answer is unknown."""
        return contains_any(answer.text, self.accepted) if self.accepted else None


@dataclass(frozen=True, kw_only=True)
class Medians:
    """Counts and medians over all questions with a passage.

    Attributes:
        n_questions: Number of questions with a passage.
        n_known: Number of these with a known answer.
        right_cached: Number of right answers from caches to questions with a known answer; None if `n_known` is 0.
        right_text: Number of right answers from text, likewise.
        empty_cached: Number of empty answers from caches, to all questions.
        empty_text: Number of empty answers from text, to all questions.
        n_both_empty: Number of questions with an empty answer both ways.
        n_same: Number of questions with the same answer both ways, ignoring case and trailing full stops. Two empty
            answers do not count.
        caches_ttft_s: Median time to first token from caches, in seconds.
        text_ttft_s: Median time to first token from text, in seconds.
        ttft_ratio: `text_ttft_s` divided by `caches_ttft_s`.
        caches_total_s: Total time of all answers from caches, in seconds.
        text_total_s: Total time of all answers from text, in seconds.
    """

    n_questions: int
    n_known: int
    right_cached: int | None
    right_text: int | None
    empty_cached: int
    empty_text: int
    n_both_empty: int
    n_same: int
    caches_ttft_s: float
    text_ttft_s: float
    ttft_ratio: float
    caches_total_s: float
    text_total_s: float


def compare(
    memory: KVMemory,
    questions: Sequence[Question],
    *,
    top_k: int,
    settings: DecodeSettings,
    on_result: Callable[[Comparison], None],
) -> list[Comparison]:
    """Answer each question both ways, alternating the order.

    The first question is first answered both ways without being counted, as a warm-up: otherwise it would pay for
    everything that is set up on first use. The check of a cache's checksum on its first read is counted.
    """
    both: tuple[ReadFrom, ReadFrom] = ("caches", "text")

    def ask(question: str, read_from: ReadFrom) -> Answer:
        return memory.ask(question, top_k=top_k, settings=settings, read_from=read_from)

    for read_from in both:
        ask(questions[0].text, read_from)
    results = []
    for index, asked in enumerate(questions):
        order = both if index % 2 == 0 else both[::-1]
        answers = {read_from: ask(asked.text, read_from) for read_from in order}
        sources = answers["caches"].sources
        result = Comparison(
            question=asked.text,
            accepted=asked.accepted,
            document_id=sources[0].document_id if sources else None,
            caches=answers["caches"],
            text=answers["text"],
        )
        on_result(result)
        results.append(result)
    return results


def medians(results: Sequence[Comparison]) -> Medians | None:
    """Counts and medians of the results; None if no question has a passage."""
    counted = [result for result in results if result.document_id is not None]
    if not counted:
        return None
    known = [result for result in counted if result.accepted]
    caches_ttft_s = statistics.median(result.caches.ttft_s for result in counted)
    text_ttft_s = statistics.median(result.text.ttft_s for result in counted)
    pairs = [(_bare(result.caches.text), _bare(result.text.text)) for result in counted]
    return Medians(
        n_questions=len(counted),
        n_known=len(known),
        right_cached=sum(bool(result.is_right(result.caches)) for result in known) if known else None,
        right_text=sum(bool(result.is_right(result.text)) for result in known) if known else None,
        empty_cached=sum(not cached for cached, _ in pairs),
        empty_text=sum(not text for _, text in pairs),
        n_both_empty=sum(not cached and not text for cached, text in pairs),
        n_same=sum(cached == text != "" for cached, text in pairs),
        caches_ttft_s=caches_ttft_s,
        text_ttft_s=text_ttft_s,
        ttft_ratio=text_ttft_s / caches_ttft_s,
        caches_total_s=sum(result.caches.total_s for result in counted),
        text_total_s=sum(result.text.total_s for result in counted),
    )


def _bare(text: str) -> str:
    return text.strip().rstrip(".").casefold()
