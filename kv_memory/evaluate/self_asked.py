"""Passages with questions that the model generates itself, answered from the full cache and compressed ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from kv_memory.compress import RefineSettings
from kv_memory.compress.refine.probes import make_probes, probe_room
from kv_memory.compress.refine.teacher import Teacher
from kv_memory.evaluate.aggregate import aggregate
from kv_memory.evaluate.answer_metrics import normalise
from kv_memory.evaluate.bench import Bench, Column
from kv_memory.evaluate.cases import Case, Query
from kv_memory.evaluate.methods import Method, make_methods
from kv_memory.evaluate.recommend import AdviceRow
from kv_memory.evaluate.reference_answers import KL_TOKENS
from kv_memory.evaluate.results import Record
from kv_memory.evaluate.task import Task
from kv_memory.lazy_compressor import load_compressor
from kv_memory.model.backbone import Backbone
from kv_memory.settings import MemorySettings

__all__ = ["ROOM_TOKENS", "SelfAsked"]

_QUESTIONS = 4  # per passage
_PROBES = 2 * _QUESTIONS  # half of the probes are questions
_PROBE_TOKENS = 16  # limit for the other probes, which are not used
_TASK = Task(name="advise", cases=lambda backbone, settings: [], score=None, text_metrics=("em",))
ROOM_TOKENS = probe_room(_PROBE_TOKENS) + KL_TOKENS  # reserved after a passage


class SelfAsked:
    """Passages measured so far.

    Args:
        backbone: The model.
        settings: Settings for compression.
        ratios: Ratios to measure.
        seed: Random seed of the questions.
    """

    def __init__(self, backbone: Backbone, settings: MemorySettings, ratios: Sequence[float], seed: int) -> None:
        compressor = load_compressor(settings, backbone)
        alone = compressor.adapter is not None and settings.selector != "combined"
        method = Method("adapter" if alone else settings.selector, compressor, "", ratios=True)
        self.columns = [Column(make_methods(["full"], backbone)[0], None)]
        self.columns += [Column(method, ratio, settings.storage) for ratio in ratios]
        self.n_passages = 0
        self.n_unanswered = 0
        self._backbone, self._seed = backbone, seed
        self._bench = Bench(backbone, _TASK, settings.layout, generate=True)
        self._records: list[list[Record]] = []  # one list per passage, one record per column

    def measure(self, text: str, go_on: Callable[[int], bool]) -> bool:
        """Measure a passage; it counts if a question about it has an answer.

        Args:
            text: The passage.
            go_on: Function that gets the index of each column before it is measured, and returns whether to continue.

        Returns:
            False if `go_on` stopped the measurement; the passage then does not count.
        """
        records: list[Record] = []
        answered: list[bool] = []
        case: Case | None = None
        for index, column in enumerate(self.columns):
            if not go_on(index):
                return False
            case = case or self._asked(text)
            if case is None:
                return True
            record = self._bench.run(case, column, key="", config="")
            answered = answered or [bool(_normal(question.answer)) for question in record.questions]
            if not any(answered):
                self.n_unanswered += len(answered)
                return True
            kept = tuple(question for question, ok in zip(record.questions, answered, strict=True) if ok)
            records.append(replace(record, questions=kept))
        self.n_unanswered += answered.count(False)
        self.n_passages += 1
        self._records.append(records)
        return True

    def _asked(self, text: str) -> Case | None:
        """The passage with the questions that the model generates about it; None if it generates none."""
        ids = self._backbone.encode_document(text)
        teacher = Teacher(
            self._backbone, [ids], room=probe_room(_PROBE_TOKENS), max_entries=RefineSettings().max_entries
        )
        (probes,) = make_probes(
            self._backbone,
            teacher,
            [ids],
            n_probes=_PROBES,
            n_held_out=0,
            probe_tokens=_PROBE_TOKENS,
            temperature=RefineSettings().temperature,
            seed=self._seed,
        )
        queries = tuple(
            Query(text=probe.question, references=(probe.question,))  # placeholder: unknown, and unused
            for probe in probes
            if probe.kind == "question"
        )
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Case(id=name, text=text, queries=queries) if queries else None

    def rows(self) -> tuple[AdviceRow, ...]:
        """One row for each keep_ratio; empty if nothing was measured."""
        if not self._records:
            return ()
        found = []
        flat = [record for records in self._records for record in records]
        for row, column in zip(aggregate(flat)[1:], range(1, len(self.columns)), strict=True):
            own = [records[column] for records in self._records]
            pairs = [
                (_normal(a.answer), _normal(b.answer))
                for records in self._records
                for a, b in zip(records[0].questions, records[column].questions, strict=True)
            ]
            kl, keep_ratio = row.means["kl"], row.keep_ratio
            assert kl is not None and keep_ratio is not None
            found.append(
                AdviceRow(
                    keep_ratio=keep_ratio,
                    method=row.method,
                    n_passages=row.n_documents,
                    n_questions=row.n,
                    size_bytes=sum(record.size_bytes or 0 for record in own) / len(own),
                    full_bytes=sum(record.n_tokens for record in own) / len(own) * self._backbone.kv_bytes_per_token,
                    kl=kl,
                    kl_ci=row.ci["kl"],
                    same=sum(bool(a) and a == b for a, b in pairs) / len(pairs),
                    seconds=row.seconds_per_document or 0.0,
                    prefills=row.prefills or 0.0,
                )
            )
        return tuple(found)


def _normal(answer: str | None) -> str:
    """SQuAD's normal form; empty if the answer is only white space and punctuation."""
    return normalise(answer or "")
