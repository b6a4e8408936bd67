"""The teacher: the model's answers from the full cache, and its log-probabilities for each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.evaluate.cases import EncodedQuery
from kv_memory.evaluate.prefilled_questions import PrefilledQuestions, batches
from kv_memory.evaluate.task import Task
from kv_memory.generate import Prompt, Run
from kv_memory.model.backbone import Backbone

__all__ = ["KL_TOKENS", "TeacherAnswer", "answers", "teach"]

KL_TOKENS = 32  # length limit of the answer on which KL is measured


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


def answers(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    prompts: Sequence[Sequence[int]],
    *,
    layout: Layout,
    max_new_tokens: int,
) -> list[tuple[str, tuple[int, ...]]]:
    """Greedy answers, decoded by the code that `ask` uses: text and token ids, including the end token.

    Args:
        backbone: The model.
        caches: Caches of the documents, in order.
        prompts: Token ids of each question in its wrapper, and of the words that the answer begins with.
        layout: Placement of documents, see `compose`.
        max_new_tokens: Length limit of an answer, in tokens.
    """
    settings = DecodeSettings(max_new_tokens=max_new_tokens)
    n_entries = len(backbone.prefix_ids) + sum(cache.n_kept for cache in caches)
    results = []
    # Decoding computes one row of logits per question; its copy of the cache takes the memory.
    for part in batches(backbone, len(prompts), n_entries=n_entries + max_new_tokens, n_tokens=1):
        run = Run(backbone, [Prompt([*ids], behind_prefix=True) for ids in prompts[part]], caches, layout, settings)
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
        said = answers(backbone, [full], prompts, layout=layout, max_new_tokens=task.max_new_tokens)
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
