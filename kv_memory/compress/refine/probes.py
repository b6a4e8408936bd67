"""Probes: what is asked about a document while its cache is refined, made from the document alone.

Four kinds, because what is practised is learned and little else: practising repetition alone, a cache forgets how to
answer. Half are questions that the model asks itself; with their first word forced, in turn, even a small model asks
sensible ones, and different ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kv_memory.compress.refine.batching import Row
from kv_memory.compress.refine.teacher import Teacher, end_ids
from kv_memory.model.backbone import Backbone

__all__ = ["KINDS", "SHARES", "Probe", "ProbeKind", "chance", "make_probes", "probe_room"]

ProbeKind = Literal["question", "statement", "continuation", "repetition"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
# Of the probes of a step. Half are questions: caches are there to be asked.
SHARES: dict[ProbeKind, float] = {"question": 0.5, "statement": 1 / 6, "continuation": 1 / 6, "repetition": 1 / 6}
_STEMS = ("What", "Who", "When", "Where", "Why", "How", "What did", "")
_ASK = "Ask one short question that the text above answers."
_STATE = "What does the text say?"
_STATEMENT = "The text says that"
_REPEAT = "Repeat the text word for word, from here on."
_GIVEN = 8  # first tokens of a span, by which it is found
# Held out are so many times more of those that the model makes up. Two statements, of which one was odd, kept whole
# refinements from being taken.
_SAMPLED = 3
_SPARE = 1.5  # questions decoded for one that is wanted: some come twice, or are none
_QUESTION_TOKENS, _ANSWER_TOKENS = 24, 16
_QUOTED = 6  # so many tokens in a row are a quotation
_LEAST = 12  # tokens of a span worth asking for
_WRAPPER_TOKENS = 96  # the most that requests and their wrappers may take; longer ones are left out


@dataclass(frozen=True)
class Probe:
    """Something asked about a document.

    Attributes:
        kind: What it is.
        row: Its tokens; those wanted are predicted as from the full cache.
        held_out: It is never practised, but decides what is kept.
        question: Its words without the prompt form's wrapper; empty for other kinds.
    """

    kind: ProbeKind
    row: Row
    held_out: bool
    question: str = ""


def probe_room(probe_tokens: int) -> int:
    """The most tokens that making probes and asking them puts behind a document."""
    return _WRAPPER_TOKENS + max(probe_tokens, _QUESTION_TOKENS + _ANSWER_TOKENS)


def chance(seed: int, ids: Sequence[int], use: str) -> random.Random:
    """Random numbers for one use on one document: the same everywhere, whatever it is batched with."""
    text = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
    return random.Random(f"{seed}:{use}:{text}")  # a str seeds through SHA-512


def make_probes(
    backbone: Backbone,
    teacher: Teacher,
    documents: Sequence[Sequence[int]],
    *,
    n_probes: int,
    n_held_out: int,
    probe_tokens: int,
    temperature: float,
    seed: int,
    unasked: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[list[Probe]]:
    """Probes of every kind about each document.

    Args:
        backbone: The model.
        teacher: Has read the documents.
        documents: Token ids, in their wrappers.
        n_probes: To practise, for each document: by `SHARES` questions and statements; spans of either kind as many as
            cover it, at most this many.
        n_held_out: Of either kind of span, for each document; three times as many questions and statements.
        probe_tokens: Longest span or statement.
        temperature: At which questions and statements are sampled.
        seed: Of all chance. A document's probes do not depend on those it is batched with.
        unasked: For each document spans of tokens that no probe quotes.
    """
    makers = [
        _Maker(backbone, index, ids, n_probes, n_held_out, probe_tokens, seed, unasked[index] if unasked else ())
        for index, ids in enumerate(documents)
    ]
    ends = end_ids(backbone)
    openings = [(maker, row) for maker in makers for row in maker.openings()]
    texts = teacher.decode(
        [row for _, row in openings],
        most=_QUESTION_TOKENS,
        ends=ends,
        temperature=temperature,
        seeds=[maker.draw.getrandbits(32) for maker, _ in openings],
    )
    for (maker, row), text in zip(openings, texts, strict=True):
        maker.take_question(row, [token for token in text if token not in ends])
    asked = [(maker, row) for maker in makers for row in maker.question_rows()]
    answers = teacher.decode([row for _, row in asked], most=_ANSWER_TOKENS, ends=ends, as_answers=True)
    for (maker, row), answer in zip(asked, answers, strict=True):
        maker.add_sampled("question", (*row.ids, *answer), len(row.ids))
    stated = [(maker, maker.statement_row()) for maker in makers for _ in range(maker.count("statement"))]
    statements = teacher.decode(
        [row for _, row in stated],
        most=probe_tokens,
        ends=ends,
        temperature=temperature,
        seeds=[maker.draw.getrandbits(32) for maker, _ in stated],
    )
    for (maker, row), statement in zip(stated, statements, strict=True):
        maker.add_sampled("statement", (*row.ids, *statement), len(row.ids))
    for maker in makers:
        maker.add_spans()
    return [maker.probes for maker in makers]


class _Maker:
    """Probes of one document."""

    def __init__(
        self,
        backbone: Backbone,
        index: int,
        ids: Sequence[int],
        n_probes: int,
        n_held_out: int,
        probe_tokens: int,
        seed: int,
        unasked: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._backbone = backbone
        self._index = index
        self._ids = list(ids)
        self._n_probes = n_probes
        self._n_held_out = n_held_out
        self._probe_tokens = probe_tokens
        self._n = {kind: max(1, round(n_probes * SHARES[kind])) for kind in KINDS}
        self._unasked = sorted(unasked)
        self._secret = {
            tuple(self._ids[i : i + _QUOTED]) for start, end in self._unasked for i in range(start, end - _QUOTED + 1)
        }
        self._questions: list[str] = []
        self._question_of: dict[tuple[int, ...], str] = {}  # by their tokens in the wrapper
        self.probes: list[Probe] = []
        self.draw = chance(seed, ids, "probes")

    def count(self, kind: ProbeKind) -> int:
        """How many of a kind are needed."""
        return self._n[kind] + _SAMPLED * self._n_held_out

    def add_sampled(self, kind: ProbeKind, ids: Sequence[int], n_given: int) -> None:
        """One more question or statement; the first of a kind are held out."""
        n_before = sum(probe.kind == kind for probe in self.probes)
        n_held_out = _SAMPLED * self._n_held_out
        if kind == "question":  # of a short document there are few, and most are to be practised
            n_held_out = max(self._n_held_out, min(n_held_out, len(self._questions) // 3))
        self._add(kind, ids, n_given, held_out=n_before < n_held_out)

    def _add(self, kind: ProbeKind, ids: Sequence[int], n_given: int, *, held_out: bool) -> None:
        """One more probe; none that nothing is wanted of."""
        if len(ids) > n_given and not self._quotes(ids):
            question = self._question_of.get(tuple(ids[:n_given]), "")
            self.probes.append(Probe(kind, Row(self._index, tuple(ids), n_given), held_out=held_out, question=question))

    def _quotes(self, ids: Sequence[int]) -> bool:
        """Whether it says what must not be asked for."""
        return any(tuple(ids[i : i + _QUOTED]) in self._secret for i in range(len(ids) - _QUOTED + 1))

    # -- questions -----------------------------------------------------------------------------------------------

    def openings(self) -> list[Row]:
        """How questions begin, for the model to go on with."""
        form = self._backbone.prompt
        rows = []
        for i in range(round(_SPARE * self.count("question"))):
            stem = _STEMS[i % len(_STEMS)]
            if form.question_before:  # in a form like `Question: ... Answer: ...` a document is followed by a question
                ids = self._backbone.encode(f"{form.question_before.rstrip(' ')}{' ' if stem else ''}{stem}")
            else:
                ids = [*self._backbone.encode_question(_ASK), *self._backbone.encode(stem)]
            rows.append(Row(self._index, tuple(ids), len(ids)))
        return rows

    def take_question(self, row: Row, text: Sequence[int]) -> None:
        """A question as it was decoded: its opening, and how the model went on."""
        stems = sorted(_STEMS, key=len, reverse=True)
        opening = self._backbone.tokenizer.decode(list(row.ids), skip_special_tokens=True)
        stem = next(stem for stem in stems if opening.endswith(stem))
        rest = self._backbone.tokenizer.decode(list(text), skip_special_tokens=True)
        question = f"{stem}{rest}".split("\n")[0].strip()
        # A small model likes to ask what a worked example asked.
        if question and question not in self._questions and question not in self._backbone.prompt.prefix:
            self._questions.append(question)

    def question_rows(self) -> list[Row]:
        """The questions in their wrapper, as many as are needed; those that end like one first."""
        ranked = sorted(self._questions, key=lambda question: not question.endswith("?"))
        asked = ranked[: self.count("question")]
        self._question_of = {tuple(self._backbone.encode_question(question)): question for question in asked}
        rows = list(self._question_of)
        self.draw.shuffle(rows)  # which are held out must not depend on their stems
        longest = probe_room(self._probe_tokens) - _ANSWER_TOKENS
        return [Row(self._index, ids, len(ids)) for ids in rows if len(ids) <= longest]

    # -- statements and spans ------------------------------------------------------------------------------------

    def statement_row(self) -> Row:
        """A request for a statement and how it begins."""
        ids = [*self._backbone.encode_question(_STATE), *self._backbone.encode(f" {_STATEMENT}")]
        return Row(self._index, tuple(ids), len(ids))

    def add_spans(self) -> None:
        """Spans to repeat and to go on with, which together cover the document: what is not practised is forgotten.

        The cuts of either kind, and those of held-out spans, lie a third of a span apart, so that no span is asked for
        twice. Held-out spans apart from all others were rejected: refinement then lost what they stood for, and the
        rule that no kind may get worse kept every start.
        """
        form = self._backbone.prompt
        lead: dict[ProbeKind, list[int]] = {
            "continuation": self._backbone.encode(form.document_before),
            "repetition": self._backbone.encode_question(_REPEAT),
        }
        for shift, kind in enumerate(lead):
            cuts = [(True, *cut) for cut in self._cuts(2 / 3, self._n_held_out)]
            cuts += [(False, *cut) for cut in self._cuts(shift / 3, self._n_probes)]
            for held_out, start, end in cuts:
                span = self._ids[start:end]
                given = min(_GIVEN, len(span) // 3)
                self._add(kind, (*lead[kind], *span), max(1, len(lead[kind]) + given), held_out=held_out)

    def _cuts(self, shift: float, most: int) -> list[tuple[int, int]]:
        """Spans that cover the document from `shift` of a span on; at most `most` of them, shuffled."""
        spans = []
        for begin, end in self._stretches():
            length = min(end - begin, self._probe_tokens)
            last = end - length
            starts = list(range(begin + round(shift * length), last + 1, length)) or [last]
            if shift < 2 / 3 and starts[-1] < last:
                starts.append(last)
            spans += [(start, start + length) for start in starts]
        self.draw.shuffle(spans)
        return spans[:most]

    def _stretches(self) -> list[tuple[int, int]]:
        """The document without what must not be asked for, in pieces long enough for a span."""
        pieces, begin = [], 0
        for start, end in self._unasked:
            pieces.append((begin, start))
            begin = end
        pieces.append((begin, len(self._ids)))
        return [(a, b) for a, b in pieces if b - a >= _LEAST or not self._unasked]
