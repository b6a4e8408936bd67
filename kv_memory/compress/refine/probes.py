"""Probes: questions and texts for refining the cache of a document, made from the document alone.

There are four kinds, because refinement improves what is trained on and little else: trained on repetition alone, a
cache forgets how to answer. Half are questions that the model asks itself. With their first word forced, in turn, even
a small model asks sensible and varied ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from kv_memory.compress.refine.batching import Row
from kv_memory.compress.refine.teacher import Teacher, stop_ids
from kv_memory.model.backbone import Backbone

ProbeKind = Literal["question", "statement", "continuation", "repetition"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
# Shares of the probes of a step. Half are questions, because caches exist to be asked.
SHARES: dict[ProbeKind, float] = {"question": 0.5, "statement": 1 / 6, "continuation": 1 / 6, "repetition": 1 / 6}
_STEMS = ("What", "Who", "When", "Where", "Why", "How", "What did", "")
_ASK = "Ask one short question that the text above answers."
_STATE = "What does the text say?"
_STATEMENT = "The text says that"
_REPEAT = "Repeat the text word for word, from here on."
_GIVEN = 8  # given tokens at the start of a span, by which it is found
# Held-out questions and statements per held-out span. With two statements, of which one was odd, whole refinements were
# rejected.
_SAMPLED = 3
_SPARE = 1.5  # questions decoded for each one wanted: some are repeated, or not questions
_QUESTION_TOKENS, _ANSWER_TOKENS = 24, 16
_QUOTED = 6  # tokens in a row that count as a quotation
_LEAST = 12  # shortest span to ask for, in tokens
_WRAPPER_TOKENS = 96  # most tokens of a request with its wrapper; longer ones are left out


@dataclass(frozen=True)
class Probe:
    """A sequence that is run behind a document."""

    kind: ProbeKind
    row: Row  # the wanted tokens are predicted as from the full cache
    held_out: bool  # never trained on, but decides which state is kept
    question: str = ""  # without the prompt form's wrapper; empty for other kinds


class ProbeSettings(NamedTuple):
    """Settings of the probes of each document."""

    n_probes: int  # training probes: questions and statements by `SHARES`; at most as many spans of either kind
    n_held_out: int  # held-out spans of either kind; three times as many questions and statements
    probe_tokens: int  # longest span or statement
    temperature: float  # for sampling questions and statements
    seed: int  # of all random choices; a document's probes do not depend on the other documents of the batch

    @property
    def room(self) -> int:
        """Most tokens that are run behind a document to make and evaluate its probes."""
        return _WRAPPER_TOKENS + max(self.probe_tokens, _QUESTION_TOKENS + _ANSWER_TOKENS)


def chance(seed: int, ids: Sequence[int], use: str) -> random.Random:
    """Random generator for one use on one document: the same everywhere, whatever the batch."""
    text = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
    return random.Random(f"{seed}:{use}:{text}")  # a str seeds through SHA-512


def make_probes(
    backbone: Backbone,
    teacher: Teacher,
    documents: Sequence[Sequence[int]],
    settings: ProbeSettings,
    *,
    unasked: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[list[Probe]]:
    """Make probes of every kind about each document, given as token ids, which `teacher` prefilled.

    No probe quotes the spans of tokens of each document in `unasked`.
    """
    makers = [
        _Maker(backbone, index, ids, settings, unasked[index] if unasked else ()) for index, ids in enumerate(documents)
    ]
    ends = stop_ids(backbone)

    def decoded(rows: list[tuple[_Maker, Row]], **options: Any) -> list[tuple[_Maker, Row, list[int]]]:
        texts = teacher.decode([row for _, row in rows], ends=ends, **options)
        return [(*one, text) for one, text in zip(rows, texts, strict=True)]

    def sampled(rows: list[tuple[_Maker, Row]], *, most: int) -> list[tuple[_Maker, Row, list[int]]]:
        seeds = [maker.draw.getrandbits(32) for maker, _ in rows]
        return decoded(rows, most=most, temperature=settings.temperature, seeds=seeds)

    # 1. Questions, sampled behind their first words.
    for maker, row, text in sampled([(m, row) for m in makers for row in m.openings()], most=_QUESTION_TOKENS):
        maker.take_question(row, [token for token in text if token not in ends])
    # 2. Answers, decoded greedily.
    asked = [(maker, row) for maker in makers for row in maker.question_rows()]
    for maker, row, answer in decoded(asked, most=_ANSWER_TOKENS, as_answers=True):
        maker.add_sampled("question", (*row.ids, *answer), len(row.ids))
    # 3. Statements, sampled.
    stated = [(maker, maker.statement_row()) for maker in makers for _ in range(maker.count("statement"))]
    for maker, row, statement in sampled(stated, most=settings.probe_tokens):
        maker.add_sampled("statement", (*row.ids, *statement), len(row.ids))
    # 4. Spans of the document.
    for maker in makers:
        maker.add_spans()
    return [maker.probes for maker in makers]


class _Maker:
    """Makes the probes of one document."""

    def __init__(
        self,
        backbone: Backbone,
        index: int,
        ids: Sequence[int],
        settings: ProbeSettings,
        unasked: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._backbone = backbone
        self._index = index
        self._ids = list(ids)
        self._settings = settings
        self._unasked = sorted(unasked)
        self._secret = {
            tuple(self._ids[i : i + _QUOTED]) for start, end in self._unasked for i in range(start, end - _QUOTED + 1)
        }
        self._questions: list[str] = []
        self._question_of: dict[tuple[int, ...], str] = {}  # by their tokens in the wrapper
        self.probes: list[Probe] = []
        self.draw = chance(settings.seed, ids, "probes")

    def count(self, kind: ProbeKind) -> int:
        """Number of questions or statements to make, held-out ones included."""
        return max(1, round(self._settings.n_probes * SHARES[kind])) + _SAMPLED * self._settings.n_held_out

    def add_sampled(self, kind: ProbeKind, ids: Sequence[int], n_given: int) -> None:
        """Add a question or statement; the first of a kind are held out."""
        n_before = sum(probe.kind == kind for probe in self.probes)
        least = self._settings.n_held_out
        n_held_out = _SAMPLED * least
        if kind == "question":  # a short document has few, and most must be left to train on
            n_held_out = max(least, min(n_held_out, len(self._questions) // 3))
        self._add(kind, ids, n_given, held_out=n_before < n_held_out)

    def _add(self, kind: ProbeKind, ids: Sequence[int], n_given: int, *, held_out: bool) -> None:
        """Add a probe, unless nothing of it is to be predicted or it quotes an excluded span."""
        if len(ids) > n_given and not self._quotes(ids):
            question = self._question_of.get(tuple(ids[:n_given]), "")
            self.probes.append(Probe(kind, Row(self._index, tuple(ids), n_given), held_out=held_out, question=question))

    def _quotes(self, ids: Sequence[int]) -> bool:
        """Whether the tokens quote a span that must not be asked for."""
        return any(tuple(ids[i : i + _QUOTED]) in self._secret for i in range(len(ids) - _QUOTED + 1))

    # -- questions -----------------------------------------------------------------------------------------------

    def openings(self) -> list[Row]:
        """Beginnings of questions, for the model to continue."""
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
        """Take a decoded question: its opening, and the model's continuation."""
        stems = sorted(_STEMS, key=len, reverse=True)
        opening = self._backbone.tokenizer.decode(list(row.ids), skip_special_tokens=True)
        stem = next(stem for stem in stems if opening.endswith(stem))
        rest = self._backbone.tokenizer.decode(list(text), skip_special_tokens=True)
        question = f"{stem}{rest}".split("\n")[0].strip()
        # A small model tends to repeat the question of a worked example.
        if question and question not in self._questions and question not in self._backbone.prompt.prefix:
            self._questions.append(question)

    def question_rows(self) -> list[Row]:
        """Questions in their wrapper, as many as are needed; those that end with a question mark first."""
        ranked = sorted(self._questions, key=lambda question: not question.endswith("?"))
        asked = ranked[: self.count("question")]
        self._question_of = {tuple(self._backbone.encode_question(question)): question for question in asked}
        rows = list(self._question_of)
        self.draw.shuffle(rows)  # which are held out must not depend on their stems
        longest = self._settings.room - _ANSWER_TOKENS
        return [Row(self._index, ids, len(ids)) for ids in rows if len(ids) <= longest]

    # -- statements and spans ------------------------------------------------------------------------------------

    def statement_row(self) -> Row:
        """Request for a statement, and the beginning of the statement."""
        ids = [*self._backbone.encode_question(_STATE), *self._backbone.encode(f" {_STATEMENT}")]
        return Row(self._index, tuple(ids), len(ids))

    def add_spans(self) -> None:
        """Add spans to repeat and to continue, which together cover the document: what is not trained on is forgotten.

        The cuts of either kind, and those of held-out spans, lie a third of a span apart, so that no span is asked for
        twice. Held-out spans apart from all others were rejected: refinement then lost their content, and the rule
        that no kind may get worse kept every start.
        """
        form = self._backbone.prompt
        lead: dict[ProbeKind, list[int]] = {
            "continuation": self._backbone.encode(form.document_before),
            "repetition": self._backbone.encode_question(_REPEAT),
        }
        for shift, kind in enumerate(lead):
            cuts = [(True, *cut) for cut in self._cuts(2 / 3, self._settings.n_held_out)]
            cuts += [(False, *cut) for cut in self._cuts(shift / 3, self._settings.n_probes)]
            for held_out, start, end in cuts:
                span = self._ids[start:end]
                given = min(_GIVEN, len(span) // 3)
                self._add(kind, (*lead[kind], *span), max(1, len(lead[kind]) + given), held_out=held_out)

    def _cuts(self, shift: float, most: int) -> list[tuple[int, int]]:
        """Spans that cover the document from a fraction `shift` of a span on; at most `most` of them, shuffled."""
        spans = []
        for begin, end in self._stretches():
            length = min(end - begin, self._settings.probe_tokens)
            last = end - length
            starts = list(range(begin + round(shift * length), last + 1, length)) or [last]
            if shift < 2 / 3 and starts[-1] < last:
                starts.append(last)
            spans += [(start, start + length) for start in starts]
        self.draw.shuffle(spans)
        return spans[:most]

    def _stretches(self) -> list[tuple[int, int]]:
        """Document without the spans that must not be asked for, in pieces long enough for a span."""
        edges = [0, *(edge for span in self._unasked for edge in span), len(self._ids)]
        pieces = zip(edges[::2], edges[1::2], strict=True)
        return [(a, b) for a, b in pieces if b - a >= _LEAST or not self._unasked]
