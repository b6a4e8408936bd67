"""Scores: questions prefilled after caches, the full model's own answers, and the measures of a method against them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.evaluate.cases import Case, EncodedQuery, Query
from kv_memory.evaluate.metrics import ALL_WANTED, TEXT_METRICS, kl_divergence, negative_log_likelihood
from kv_memory.evaluate.question_records import Measured
from kv_memory.evaluate.tasks.task import Task
from kv_memory.generate import Prompt, Run, compose, first_token_rule
from kv_memory.model.backbone import Backbone

KL_TOKENS = 32  # length limit of the answer on which KL is measured
_CPU_BYTES, _GPU_BYTES = 1 << 30, 4 << 30  # size limit of caches and logits of one batch


class PrefilledQuestions:
    """Questions prefilled once; each continuation is prefilled after them and then removed.

    One prefill of the questions thus serves the full model's answer, the reference and every choice.

    Args:
        backbone: The model.
        caches: Distilled caches of the document; empty for the floor.
        prompts: Token ids of each question.
        layout: Placement of documents, see `compose`.
        n_new: Length of the longest continuation, in tokens.

    Raises:
        ContextWindowError: Caches, questions and continuations do not fit the model.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Backbone,
        caches: Sequence[DistilledCache],
        prompts: Sequence[Sequence[int]],
        *,
        layout: Layout,
        n_new: int,
    ) -> None:
        self._backbone, self._caches, self._prompts, self._layout = backbone, caches, prompts, layout
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = _padded(prompts)
        self._cache = compose(
            backbone, caches, layout=layout, n_question=ids.shape[1], n_new=n_new, batch_size=len(prompts)
        )
        ragged = bool((lengths != lengths[0]).any())
        self._first = backbone.logits(ids, self._cache, lengths=lengths if ragged else None)

    def follow(self, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """Log-probabilities at every token of a continuation of each question.

        Args:
            rows: Token ids, one row per question; a row may be empty.

        Yields:
            `(len(row), vocab_size)`, float32. One at a time, because together they are large.
        """
        rest = self._rest(rows)
        for index, row in enumerate(rows):
            logits = self._first[index : index + 1].float()
            if rest is not None and len(row) > 1:
                logits = torch.cat([logits, rest[index, : len(row) - 1].float()])
            yield logits[: len(row)].log_softmax(-1)

    def decode(self, rows: Sequence[int], settings: DecodeSettings) -> list[str]:
        """Answers to some of the questions, decoded by the code that `ask` uses; `follow` is invalid afterwards."""
        self._cache.keep_rows(rows)
        prompts = [Prompt([*self._prompts[row]], behind_prefix=True) for row in rows]
        read = self._cache, self._first[list(rows)]
        run = Run(self._backbone, prompts, self._caches, self._layout, settings, read=read)
        for _ in run.steps():
            pass
        return [generation.text.strip() for generation in run.results()]

    @torch.no_grad()
    def _rest(self, rows: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Logits after every token but the last. Rows are padded at their end, where attention does not reach."""
        width = max(len(row) for row in rows) - 1
        if width < 1:
            return None
        logits = self._backbone.logits(_padded([row[:-1] for row in rows]), self._cache, every=True)
        self._cache.rewind(width)
        return logits


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def batches(backbone: Backbone, n_rows: int, *, n_entries: int, n_tokens: int) -> list[slice]:
    """Rows split into batches whose caches and logits take at most 1 GiB (4 on a GPU), with at least one row each.

    Args:
        backbone: The model.
        n_rows: Number of rows.
        n_entries: Number of entries of the cache that is copied for each row.
        n_tokens: Number of tokens prefilled after it.
    """
    row_bytes = (n_entries + n_tokens) * backbone.kv_bytes_per_token
    row_bytes += n_tokens * int(backbone.config.vocab_size) * backbone.dtype.itemsize
    limit = _CPU_BYTES if backbone.device.type == "cpu" else _GPU_BYTES
    size = max(1, limit // row_bytes)
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


@dataclass(frozen=True, eq=False)
class TeacherAnswer:
    """The full cache's answer to one question.

    Attributes:
        ids: Tokens over which KL is measured: its own greedy answer, up to and including the token that ends it; or
            the reference, if the task measures there. At most `KL_TOKENS`.
        log_probs: Log-probabilities at these tokens, `(len(ids), vocab_size)`, float32, on the model's device.
        text: Decoded answer; empty if the task measures on the reference.
        whole: True if `ids` is the complete answer.
        joined_log_probs: The same as `log_probs`, from the joined full caches of the single documents; None if there
            is one document.
    """

    ids: tuple[int, ...]
    log_probs: torch.Tensor
    text: str
    whole: bool
    joined_log_probs: torch.Tensor | None = None


def greedy_answers(
    backbone: Backbone, full: DistilledCache, prompts: Sequence[Sequence[int]], *, layout: Layout, max_new_tokens: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Greedy answers, decoded by the code that `ask` uses: text and token ids, including the end token."""
    settings = DecodeSettings(max_new_tokens=max_new_tokens)
    n_entries = len(backbone.prefix_ids) + full.n_kept
    results = []
    # Decoding computes one row of logits per question; its copy of the cache takes the memory.
    for part in batches(backbone, len(prompts), n_entries=n_entries + max_new_tokens, n_tokens=1):
        run = Run(backbone, [Prompt([*ids], behind_prefix=True) for ids in prompts[part]], [full], layout, settings)
        for _ in run.steps():
            pass
        results += [(generation.text.strip(), generation.token_ids) for generation in run.results()]
    return results


def teach(
    backbone: Backbone,
    full: DistilledCache,
    encoded: Sequence[EncodedQuery],
    task: Task,
    *,
    layout: Layout,
    joined: Sequence[DistilledCache] = (),
) -> list[TeacherAnswer]:
    """The full model's answers to all questions of a document, and its log-probabilities there.

    The log-probabilities come from one teacher-forced pass, as for every method. Those of decoding were rejected: in
    bfloat16 the two differ in the last bits, and the full cache would have a KL to itself.

    Args:
        backbone: The model.
        full: Cache of one prefill of the document, or of all documents.
        encoded: The questions, as tokens.
        task: The task, which determines where KL is measured and the length of answers.
        layout: Placement of documents, see `compose`.
        joined: Full cache of each document, if there are several.
    """
    if task.kl_on == "answer":
        prompts = [query.prompt for query in encoded]
        said = greedy_answers(backbone, full, prompts, layout=layout, max_new_tokens=task.max_new_tokens)
    else:
        said = [("", query.reference) for query in encoded]
    rows = [ids[:KL_TOKENS] for _, ids in said]
    longest = max(len(query.prompt) for query in encoded) + KL_TOKENS
    taught: list[TeacherAnswer] = []
    for part in batches(backbone, len(rows), n_entries=full.n_kept + len(backbone.prefix_ids), n_tokens=longest):
        prompts = [query.prompt for query in encoded[part]]
        asked = PrefilledQuestions(backbone, [full], prompts, layout=layout, n_new=KL_TOKENS)
        found = list(asked.follow(rows[part]))
        beside: list[torch.Tensor | None] = [None] * len(found)
        if joined:
            beside[:] = PrefilledQuestions(backbone, joined, prompts, layout=layout, n_new=KL_TOKENS).follow(rows[part])
        for own, other, ids, (text, all_ids) in zip(found, beside, rows[part], said[part], strict=True):
            whole = len(ids) == len(all_ids)
            taught.append(TeacherAnswer(ids=ids, log_probs=own, text=text, whole=whole, joined_log_probs=other))
    return taught


def score(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    case: Case,
    encoded: Sequence[EncodedQuery],
    taught: Sequence[TeacherAnswer],
    task: Task,
    *,
    layout: Layout,
    generate: bool,
) -> list[Measured]:
    """Measure all questions of a document.

    Args:
        backbone: The model.
        caches: The method's caches of the document; empty for the floor.
        case: The document and its questions.
        encoded: Those questions, as tokens.
        taught: The full model's answers to them.
        task: The task, which determines the metrics.
        layout: Placement of documents, see `compose`.
        generate: True to decode answers if the task has text metrics.

    Raises:
        ContextWindowError: Document, question and answer do not fit the model.
    """
    settings = DecodeSettings(max_new_tokens=task.max_new_tokens) if generate and task.text_metrics else None
    n_new = max(KL_TOKENS, *(len(row) for query in encoded for row in (query.reference, *query.choices)))
    n_new = max(n_new, settings.max_new_tokens) if settings else n_new
    n_entries = len(backbone.prefix_ids) + sum(cache.n_kept for cache in caches)
    n_tokens = max(len(query.prompt) for query in encoded) + n_new
    measured: list[Measured] = []
    for part in batches(backbone, len(encoded), n_entries=n_entries, n_tokens=n_tokens):
        prompts = [query.prompt for query in encoded[part]]
        asked = PrefilledQuestions(backbone, caches, prompts, layout=layout, n_new=n_new)
        measured += _score_batch(backbone, asked, case.queries[part], encoded[part], taught[part], task, settings)
    return measured


def _score_batch(
    backbone: Backbone,
    asked: PrefilledQuestions,
    queries: Sequence[Query],
    encoded: Sequence[EncodedQuery],
    taught: Sequence[TeacherAnswer],
    task: Task,
    settings: DecodeSettings | None,
) -> list[Measured]:
    kl: list[tuple[float, float | None]] = []
    texts: list[str | None] = []
    for log_probs, teacher, query in zip(asked.follow([one.ids for one in taught]), taught, encoded, strict=True):
        joined = teacher.joined_log_probs
        beside = None if joined is None else kl_divergence(joined, log_probs)
        kl.append((kl_divergence(teacher.log_probs, log_probs), beside))
        # Greedy decoding would follow the same path to the same end, so this answer is known, and is not decoded.
        texts.append(teacher.text if teacher.whole and _agrees(backbone, query, teacher, log_probs) else None)
    nll = _losses(asked, [query.reference for query in encoded])
    accuracy = _accuracy(asked, queries, encoded)
    if settings is None:
        texts = [None] * len(queries)
    elif open_rows := [row for row, text in enumerate(texts) if text is None]:
        for row, text in zip(open_rows, asked.decode(open_rows, settings), strict=True):
            texts[row] = text
    return [
        Measured(
            kl=kl[row][0],
            nll=nll[row],
            accuracy=accuracy[row],
            kl_joined=kl[row][1],
            answer=text,
            **(_judged(text, query, task) if text is not None else {}),
        )
        for row, (text, query) in enumerate(zip(texts, queries, strict=True))
    ]


def _agrees(backbone: Backbone, query: EncodedQuery, teacher: TeacherAnswer, log_probs: torch.Tensor) -> bool:
    """Whether the likeliest token (of those that may open an answer) is the full model's at every token."""
    return first_token_rule(backbone, query.prompt).greedy(log_probs, teacher.ids) == list(teacher.ids)


def _judged(text: str, query: Query, task: Task) -> dict[str, float]:
    metrics = ALL_WANTED if query.all_wanted else TEXT_METRICS
    return {name: metrics[name](text, query.references) for name in task.text_metrics}


def _losses(asked: PrefilledQuestions, rows: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood per token of each row; infinite for an empty one."""
    return [
        negative_log_likelihood(log_probs, row) if row else math.inf
        for log_probs, row in zip(asked.follow(rows), rows, strict=True)
    ]


def _accuracy(
    asked: PrefilledQuestions, queries: Sequence[Query], encoded: Sequence[EncodedQuery]
) -> list[float | None]:
    n_choices = max(len(query.choices) for query in encoded)
    losses = [
        _losses(asked, [query.choices[i] if i < len(query.choices) else () for query in encoded])
        for i in range(n_choices)
    ]
    result: list[float | None] = []
    for row, query in enumerate(queries):
        own = [losses[i][row] for i in range(len(query.choices))]
        result.append(float(own.index(min(own)) == query.correct) if own else None)
    return result
