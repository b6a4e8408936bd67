"""Batches of token ids from examples: documents, and the rows of tokens that follow them.

A batch depends only on the seed and its step, so that the number of the next step suffices to resume a run exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kv_memory.compress.refine.batching import Row
from kv_memory.datasets import Example, Question
from kv_memory.errors import DatasetError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import TrainSettings

REPEAT = "\nRepeat: "
CUE_TOKENS = 6  # tokens before a span, given to identify its start
_MOST_JOINED = 3  # documents of one group


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input of one training step.

    Attributes:
        documents: Token ids of the documents, in their wrappers.
        groups: Indices of the documents that are joined in each group, in order. Every document is in one group.
        rows: Questions with their answers, and requests with their spans; at least one. The `document` of a row is the
            index of its group. A question without tokens to predict is to be answered by the teacher.
        keep_ratio: Keep ratio drawn for this batch.
        seed: Seed of what else the step draws.
    """

    documents: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]
    keep_ratio: float
    seed: int = 0


class Batches:
    """Builds the batch of any step; a `DatasetError` without examples."""

    def __init__(self, examples: Sequence[Example], backbone: Backbone, settings: TrainSettings) -> None:
        if not examples:
            raise DatasetError("no examples to train on", next_step="Pass a data set with examples.")
        self._examples = examples
        self._backbone = backbone
        self._settings = settings
        self._before = backbone.encode(backbone.prompt.document_before)
        self._after = backbone.encode(backbone.prompt.document_after)
        stop = backbone.prompt.stop
        self._end = backbone.encode(stop[0]) if stop else [int(backbone.tokenizer.eos_token_id)]
        room = backbone.context_window - len(backbone.prefix_ids) - 2 * (settings.answer_tokens + 128)
        self._most = min(settings.max_tokens, room)

    def batch(self, step: int, *, tries: int = 50) -> Batch:
        """The batch of a step, counted from 0; that of another step, at most `tries` times, if it has no rows.

        Raises:
            DatasetError: Nothing can be asked about the documents of any of these steps.
        """
        # 1. Everything random about this batch is drawn from its own generator; keep ratios are log-uniform.
        settings = self._settings
        rng = random.Random(f"{settings.seed}:{step}")
        ratio = math.exp(rng.uniform(math.log(settings.min_ratio), math.log(settings.max_ratio)))
        documents: list[tuple[int, ...]] = []
        groups: list[tuple[int, ...]] = []
        rows: list[Row] = []
        # 2. Each member of the batch is a group: its next example of the epoch, perhaps joined with random others.
        first = step * settings.batch_documents
        for number in range(first, first + settings.batch_documents):
            n_joined = 1
            if rng.random() < settings.composition_share:
                n_joined = rng.randint(2, _MOST_JOINED)
            members = [self._example(number)]
            members += [self._examples[rng.randrange(len(self._examples))] for _ in range(n_joined - 1)]
            rng.shuffle(members)
            # 3. Joined documents share the token limit, the questions and the spans of a single document.
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
                "these documents have no questions and are too short for a span",
                next_step="Train on longer documents, or on examples with questions.",
            )
        if not rows:  # all documents are too short for a row: use those of another step
            return self.batch(step + 1_000_003, tries=tries - 1)
        seed = rng.getrandbits(32)
        return Batch(documents=tuple(documents), groups=tuple(groups), rows=tuple(rows), keep_ratio=ratio, seed=seed)

    def _example(self, number: int) -> Example:
        """The example with this number: every example once per epoch, each epoch in its own order."""
        epoch, place = divmod(number, len(self._examples))
        return self._examples[_order(self._settings.seed, epoch, len(self._examples))[place]]

    def _cut(self, example: Example, most: int, rng: random.Random) -> tuple[list[int], list[Question]]:
        """The document's tokens, or a random window of a long document, and the questions that they can answer."""
        ids, offsets = self._backbone.encode_with_offsets(example.context)
        if len(ids) <= most:
            return ids, list(example.questions)
        start = rng.randrange(len(ids) - most + 1)
        text = example.context[offsets[start][0] : offsets[start + most - 1][1]]
        # An answer that is not a quotation from the window may depend on other text, so its question is dropped.
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
                rows.append(Row(group, tuple(asked), len(asked)))
                continue
            answer = backbone.encode_text(" " + question.answers[0].strip())[: settings.answer_tokens]
            rows.append(Row(group, (*asked, *answer, *self._end), len(asked)))
        n_spans = settings.spans_per_document if questions else settings.spans_per_document + 2
        for _ in range(-(-n_spans // share)):
            if len(ids) >= CUE_TOKENS + 8:
                length = min(settings.span_tokens, len(ids) - CUE_TOKENS)
                start = rng.randrange(len(ids) - CUE_TOKENS - length + 1)
                request = backbone.encode(REPEAT) if rng.random() < 0.5 else []
                asked = [*request, *ids[start : start + CUE_TOKENS]]
                span = ids[start + CUE_TOKENS : start + CUE_TOKENS + length]
                rows.append(Row(group, (*asked, *span), len(asked)))
        return rows


@lru_cache(maxsize=2)  # of training, and of the evaluation in between
def _order(seed: int, epoch: int, n: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}:epoch:{epoch}").shuffle(order)
    return order


def split_batch(batch: Batch, n_parts: int, *, by_rows: bool) -> list[Batch]:
    """Split a batch into at most `n_parts` (a power of 2) that together have its groups and rows, each row once.

    With `by_rows`, single groups are divided too, by their rows, with their documents in every part, and parts without
    rows are dropped. The warm-up does without, as its loss covers all documents and needs no rows.
    """
    parts = [batch]
    for _ in range(n_parts.bit_length() - 1):
        parts = [half for part in parts for half in _halves(part, by_rows=by_rows)]
    return [part for part in parts if part.rows] if by_rows else parts


def _halves(batch: Batch, *, by_rows: bool) -> list[Batch]:
    n_groups, n_rows = len(batch.groups), len(batch.rows)
    if n_groups > 1:
        return [_of_groups(batch, 0, n_groups // 2), _of_groups(batch, n_groups // 2, n_groups)]
    if by_rows and n_rows > 1:
        return [replace(batch, rows=batch.rows[: n_rows // 2]), replace(batch, rows=batch.rows[n_rows // 2 :])]
    return [batch]


def _of_groups(batch: Batch, begin: int, end: int) -> Batch:
    """The groups from `begin` to `end`, whose documents follow one another, with their rows."""
    first, last = batch.groups[begin][0], batch.groups[end - 1][-1]
    return replace(
        batch,
        documents=batch.documents[first : last + 1],
        groups=tuple(tuple(index - first for index in group) for group in batch.groups[begin:end]),
        rows=tuple(replace(row, document=row.document - begin) for row in batch.rows if begin <= row.document < end),
    )
