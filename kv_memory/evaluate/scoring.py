"""Scores: questions prefilled after caches, the full model's own answers, and the measures of a method against them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.evaluate.cases import Case, EncodedQuery, Query, encode_query
from kv_memory.evaluate.metrics import ALL_WANTED, TEXT_METRICS, kl_divergence, negative_log_likelihood
from kv_memory.evaluate.question_records import Measured
from kv_memory.evaluate.tasks.task import Task
from kv_memory.generate import Answer, Generator, Prompt, Request, Scheduler, compose
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import FirstToken
from kv_memory.model.int8_weights import plain_weights

KL_TOKENS = 32  # length limit of the answer on which KL is measured
_CPU_BYTES, _GPU_BYTES = 1 << 30, 4 << 30  # size limit of caches and logits of one batch


class PrefilledQuestions:
    """Questions prefilled once; each continuation is prefilled after them and then removed.

    One prefill of the questions thus serves the full model's answer, the reference and every choice. Without caches it
    is the floor. `n_new` is the length of the longest continuation, in tokens.

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
        self._backbone, self._prompts = backbone, prompts
        longest = max(map(len, prompts))
        whole = compose(backbone, caches, layout=layout, n_question=longest, n_new=n_new)
        self._caches = [whole.copy(room=len(prompt) + n_new) for prompt in prompts]
        self._first = backbone.packed_logits(list(zip(prompts, self._caches, strict=True)))

    @torch.no_grad()
    def follow(self, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """Yield log-probabilities at every token of a continuation of each question: `(len(row), vocab_size)`, float32.

        A row of token ids may be empty. Results come one at a time, because together they are large.
        """
        longer = [index for index, row in enumerate(rows) if len(row) > 1]  # the last token needs no logits
        rest: dict[int, torch.Tensor] = {}
        if longer:
            packed = [(rows[index][:-1], self._caches[index]) for index in longer]
            logits = self._backbone.packed_logits(packed, every=True)
            rest = dict(zip(longer, logits.split([len(ids) for ids, _ in packed]), strict=True))
            for ids, cache in packed:
                cache.rewind(len(ids))
        for index, row in enumerate(rows):
            logits = self._first[index : index + 1].float()
            if index in rest:
                logits = torch.cat([logits, rest[index].float()])
            yield logits[: len(row)].log_softmax(-1)

    def decode(self, rows: Sequence[int], settings: DecodeSettings) -> list[str]:
        """Answers to some of the questions, decoded by the code that `ask` uses; `follow` is invalid afterwards."""
        backbone = self._backbone
        answers = Scheduler(max_batch=len(rows)).answers(
            partial(Request, backbone, prompt, self._caches[row], settings, first=self._first[row])
            for row, prompt in zip(rows, _behind_prefix([self._prompts[row] for row in rows]), strict=True)
        )
        return [answer.text.strip() for answer in answers]


def batches(backbone: Backbone, n_rows: int, *, n_entries: int, n_tokens: int) -> list[slice]:
    """Rows split into batches whose caches and logits take at most 1 GiB (4 on a GPU), with at least one row each.

    For each row a cache of `n_entries` is copied, and `n_tokens` are prefilled after it.
    """
    row_bytes = (n_entries + n_tokens) * backbone.kv_bytes_per_token
    row_bytes += n_tokens * int(backbone.config.vocab_size) * backbone.dtype.itemsize
    limit = _CPU_BYTES if backbone.device.type == "cpu" else _GPU_BYTES
    size = max(1, limit // row_bytes)
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def greedy_answers(
    backbone: Backbone, full: DistilledCache, prompts: Sequence[Sequence[int]], *, layout: Layout, max_new_tokens: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Greedy answers, decoded by the code that `ask` uses: text and token ids, including the end token."""
    settings = DecodeSettings(max_new_tokens=max_new_tokens)
    n_entries = len(backbone.prefix_ids) + full.n_kept + max_new_tokens
    answers: list[Answer] = []
    # Decoding computes one row of logits per question; its copy of the cache takes the memory.
    for part in batches(backbone, len(prompts), n_entries=n_entries, n_tokens=1):
        generator = Generator(backbone, layout=layout, scheduler=Scheduler(max_batch=len(prompts[part])))
        answers += generator.reply_batch(_behind_prefix(prompts[part]), [full], settings=settings)
    return [(answer.text.strip(), answer.token_ids) for answer in answers]


def _behind_prefix(prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    return [Prompt([*ids], behind_prefix=True) for ids in prompts]


class _Taught(NamedTuple):
    """The full cache's answer to one question; its text is empty if the task measures on the reference.

    KL is measured over `ids`, at most `KL_TOKENS`: its own greedy answer, up to and including the token that ends it
    (`whole` if that is among them), or the reference. Log-probabilities at these tokens, also from the joined full
    caches of several documents, are `(len(ids), vocab_size)`, float32, on the model's device.
    """

    ids: tuple[int, ...]
    text: str
    whole: bool
    log_probs: torch.Tensor
    joined_log_probs: torch.Tensor | None


class CaseScorer:
    """Measures caches on the questions about one document, against the full model's own answers to them.

    The full model's log-probabilities come from one teacher-forced pass, as for every method. Those of decoding were
    rejected: in bfloat16 the two differ in the last bits, and the full cache would have a KL to itself.

    A model with int8 weights is measured against its plain ones.

    `full` is the cache of one prefill of all documents, `joined` that of each document if there are several. With
    `generate`, answers are decoded if the task has text metrics.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        case: Case,
        full: DistilledCache,
        joined: Sequence[DistilledCache] = (),
        *,
        layout: Layout,
        generate: bool,
    ) -> None:
        self._backbone, self._task, self._queries, self._layout = backbone, task, case.queries, layout
        self._generate = generate and bool(task.text_metrics)
        self._encoded = [encode_query(backbone, query) for query in case.queries]
        said: Sequence[tuple[str, tuple[int, ...]]] = [("", query.reference) for query in self._encoded]
        if task.kl_on == "answer":
            prompts = [query.prompt for query in self._encoded]
            with plain_weights():
                said = greedy_answers(backbone, full, prompts, layout=layout, max_new_tokens=task.max_new_tokens)
        rows = [ids[:KL_TOKENS] for _, ids in said]
        with plain_weights():
            own = self._log_probs([full], rows)
            beside = self._log_probs(joined, rows) if joined else [None] * len(rows)
        self._taught = [
            _Taught(row, text, len(row) == len(ids), log_probs, other)
            for row, (text, ids), log_probs, other in zip(rows, said, own, beside, strict=True)
        ]

    def _log_probs(self, caches: Sequence[DistilledCache], rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [t for part, asked in self._asked(caches, KL_TOKENS) for t in asked.follow(rows[part])]

    def score(self, caches: Sequence[DistilledCache]) -> list[Measured]:
        """Measure all questions with a method's caches of the document; without caches, the floor.

        Raises:
            ContextWindowError: Document, question and answer do not fit the model.
        """
        n_new = max(KL_TOKENS, *(len(row) for query in self._encoded for row in (query.reference, *query.choices)))
        n_new = max(n_new, self._task.max_new_tokens) if self._generate else n_new
        return [one for part, asked in self._asked(caches, n_new) for one in self._score_batch(asked, part)]

    def _asked(self, caches: Sequence[DistilledCache], n_new: int) -> Iterator[tuple[slice, PrefilledQuestions]]:
        """The questions in batches, prefilled after the caches."""
        prompts = [query.prompt for query in self._encoded]
        n_entries = len(self._backbone.prefix_ids) + sum(cache.n_kept for cache in caches)
        n_tokens = max(map(len, prompts)) + n_new
        for part in batches(self._backbone, len(prompts), n_entries=n_entries, n_tokens=n_tokens):
            yield part, PrefilledQuestions(self._backbone, caches, prompts[part], layout=self._layout, n_new=n_new)

    def _score_batch(self, asked: PrefilledQuestions, part: slice) -> Iterator[Measured]:
        queries, encoded, taught = self._queries[part], self._encoded[part], self._taught[part]
        kl: list[tuple[float, float | None]] = []
        texts: list[str | None] = []
        for log_probs, teacher, query in zip(asked.follow([one.ids for one in taught]), taught, encoded, strict=True):
            joined = teacher.joined_log_probs
            beside = None if joined is None else kl_divergence(joined, log_probs)
            kl.append((kl_divergence(teacher.log_probs, log_probs), beside))
            # Greedy decoding would follow the same path to the same end, so this answer is known, and is not decoded.
            known = self._generate and teacher.whole and _agrees(self._backbone, query, teacher, log_probs)
            texts.append(teacher.text if known else None)
        nll = _losses(asked, [query.reference for query in encoded])
        accuracy = _accuracy(asked, queries, encoded)
        open_rows = [row for row, text in enumerate(texts) if text is None]
        if self._generate and open_rows:
            settings = DecodeSettings(max_new_tokens=self._task.max_new_tokens)
            for row, decoded in zip(open_rows, asked.decode(open_rows, settings), strict=True):
                texts[row] = decoded
        for row, own in enumerate(queries):
            answer, metrics = texts[row], ALL_WANTED if own.all_wanted else TEXT_METRICS
            names = () if answer is None else self._task.text_metrics
            yield Measured(
                kl=kl[row][0],
                nll=nll[row],
                accuracy=accuracy[row],
                kl_joined=kl[row][1],
                answer=answer,
                **{name: metrics[name](answer or "", own.references) for name in names},
            )


def _agrees(backbone: Backbone, query: EncodedQuery, teacher: _Taught, log_probs: torch.Tensor) -> bool:
    """Whether the likeliest token (of those that may open an answer) is the full model's at every token."""
    behind = query.prompt[-1] if query.prompt else None
    opening = FirstToken(tokenizer=backbone.tokenizer, end_ids=backbone.end_ids, behind=behind)
    return opening.greedy(log_probs, teacher.ids) == list(teacher.ids)


def _losses(asked: PrefilledQuestions, rows: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood per token of each row; infinite for an empty one."""
    return [
        negative_log_likelihood(log_probs, row) if row else math.inf
        for log_probs, row in zip(asked.follow(rows), rows, strict=True)
    ]


def _accuracy(
    asked: PrefilledQuestions, queries: Sequence[Query], encoded: Sequence[EncodedQuery]
) -> list[float | None]:
    """1 for each question whose correct choice is the likeliest, else 0; None without choices."""
    by_choice = itertools.zip_longest(*(query.choices for query in encoded), fillvalue=())
    losses = [_losses(asked, rows) for rows in by_choice]
    result: list[float | None] = []
    for row, query in enumerate(queries):
        own = [of_choice[row] for of_choice in losses]
        result.append(float(own.index(min(own)) == query.correct) if query.choices else None)
    return result
