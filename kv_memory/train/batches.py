"""From examples to batches of token ids: documents, and the rows of tokens that follow them.

A batch depends on the seed and its step alone, so that a run is resumed exactly by the number of its next step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kv_memory.datasets import Example, Question
from kv_memory.errors import DatasetError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import TrainSettings

__all__ = ["Batch", "Batches", "Row"]

REPEAT = "\nRepeat: "
CUE_TOKENS = 6  # of a span, given to say where it begins


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens that follow a document.

    Attributes:
        group: Which group of documents they follow.
        ids: Question and answer, or request and span. Without its answer where the teacher shall write it.
        n_asked: How many of them are the question or request.
        wants_answer: The teacher writes the answer.
    """

    group: int
    ids: tuple[int, ...]
    n_asked: int
    wants_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step reads.

    Attributes:
        documents: Token ids in their wrappers.
        groups: For each group the documents it is joined from, in order. Every document is in one group.
        rows: What follows the groups; at least one row.
        keep_ratio: Drawn for this step.
    """

    documents: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]
    keep_ratio: float


class Batches:
    """Makes the batch of any step.

    Args:
        examples: To train on; at least one.
        backbone: Whose tokenizer and prompt form are used.
        settings: Of the run.

    Raises:
        DatasetError: There are no examples.
    """

    def __init__(self, examples: Sequence[Example], backbone: Backbone, settings: TrainSettings) -> None:
        if not examples:
            raise DatasetError("there is nothing to train on", next_step="Name a data set that holds examples.")
        self._examples = examples
        self._backbone = backbone
        self._settings = settings
        self._order: tuple[int, list[int]] = (-1, [])
        self._before = backbone.encode(backbone.prompt.document_before)
        self._after = backbone.encode(backbone.prompt.document_after)
        stop = backbone.prompt.stop
        self._end = backbone.encode(stop[0]) if stop else [int(backbone.tokenizer.eos_token_id)]
        room = backbone.context_window - len(backbone.prefix_ids) - 2 * (settings.answer_tokens + 128)
        self._most = min(settings.max_tokens, room)

    def batch(self, step: int, *, tries: int = 50) -> Batch:
        """The batch of a step, counted from 0.

        Args:
            step: Which.
            tries: How many other steps' documents to look at where nothing can be asked about these.

        Raises:
            DatasetError: There is nothing to ask about any of them.
        """
        settings = self._settings
        rng = random.Random(f"{settings.seed}:{step}")
        ratio = math.exp(rng.uniform(math.log(settings.min_ratio), math.log(settings.max_ratio)))
        documents: list[tuple[int, ...]] = []
        groups: list[tuple[int, ...]] = []
        rows: list[Row] = []
        first = step * settings.batch_documents
        for number in range(first, first + settings.batch_documents):
            n_joined = 1
            if rng.random() < settings.composition_share:
                n_joined = rng.randint(2, settings.most_joined)
            members = [self._example(number)]
            members += [self._examples[rng.randrange(len(self._examples))] for _ in range(n_joined - 1)]
            rng.shuffle(members)
            most = max(8, self._most // n_joined - len(self._before) - len(self._after))
            group = []
            for member in members:
                ids, questions = self._cut(member, most, rng)
                group.append(len(documents))
                documents.append((*self._before, *ids, *self._after))
                rows += self._rows(len(groups), ids, questions, rng, share=n_joined)
            groups.append(tuple(group))
        if not rows and tries == 0:
            raise DatasetError(
                "nothing can follow these documents: no questions, and too short for a span",
                next_step="Train on longer documents, or on examples with questions.",
            )
        if not rows:  # only documents too short to ask anything about: those of another step
            return self.batch(step + 1_000_003, tries=tries - 1)
        return Batch(documents=tuple(documents), groups=tuple(groups), rows=tuple(rows), keep_ratio=ratio)

    def _example(self, number: int) -> Example:
        """Every example once an epoch, each epoch in an order of its own."""
        epoch, place = divmod(number, len(self._examples))
        if self._order[0] != epoch:
            order = list(range(len(self._examples)))
            random.Random(f"{self._settings.seed}:epoch:{epoch}").shuffle(order)
            self._order = epoch, order
        return self._examples[self._order[1][place]]

    def _cut(self, example: Example, most: int, rng: random.Random) -> tuple[list[int], list[Question]]:
        """The document's tokens, a window of them where it is long, and the questions the window can answer."""
        ids, offsets = self._backbone.encode_with_offsets(example.context)
        if len(ids) <= most:
            return ids, list(example.questions)
        start = rng.randrange(len(ids) - most + 1)
        text = example.context[offsets[start][0] : offsets[start + most - 1][1]]
        # An answer that is not a quotation may draw on anything: its question stays only if nothing tells against it.
        kept = [q for q in example.questions if q.answers[0] in text]
        return ids[start : start + most], kept

    def _rows(
        self, group: int, ids: list[int], questions: list[Question], rng: random.Random, *, share: int
    ) -> list[Row]:
        settings, backbone = self._settings, self._backbone
        rows = []
        most = -(-settings.questions_per_document // share)
        for question in rng.sample(questions, min(most, len(questions))):
            asked = backbone.encode_question(question.text)
            if settings.answers == "teacher":
                rows.append(Row(group=group, ids=tuple(asked), n_asked=len(asked), wants_answer=True))
                continue
            answer = backbone.encode_text(" " + question.answers[0].strip())[: settings.answer_tokens]
            rows.append(Row(group=group, ids=(*asked, *answer, *self._end), n_asked=len(asked)))
        n_spans = settings.spans_per_document if questions else settings.spans_per_document + 2
        for _ in range(-(-n_spans // share)):
            if len(ids) >= CUE_TOKENS + 8:
                length = min(settings.span_tokens, len(ids) - CUE_TOKENS)
                start = rng.randrange(len(ids) - CUE_TOKENS - length + 1)
                request = backbone.encode(REPEAT) if rng.random() < 0.5 else []
                asked = [*request, *ids[start : start + CUE_TOKENS]]
                span = ids[start + CUE_TOKENS : start + CUE_TOKENS + length]
                rows.append(Row(group=group, ids=(*asked, *span), n_asked=len(asked)))
        return rows
