"""The teacher: what the model answers from the full cache, and how sure of each token it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_memory.backbone import Backbone
from kv_memory.cache import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.evaluate.asked import Asked, batches
from kv_memory.evaluate.cases import Case, EncodedQuery
from kv_memory.evaluate.task import Task
from kv_memory.generate import Generator

__all__ = ["KL_TOKENS", "TeacherAnswer", "answers", "teach"]

KL_TOKENS = 32  # of the full model's answer, at most


@dataclass(frozen=True, eq=False)
class TeacherAnswer:
    """What the full cache makes of one question.

    Attributes:
        ids: The tokens over which KL is measured: of its own greedy answer, up to and including the one that ends it;
            or of the reference, where the task measures there.
        log_probs: `(len(ids), vocab_size)`, float32, on the model's device.
        text: Its answer; empty where the task measures on the reference.
        whole: Whether `ids` is all of the answer.
    """

    ids: tuple[int, ...]
    log_probs: torch.Tensor
    text: str
    whole: bool


def answers(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    questions: Sequence[str],
    *,
    layout: Layout,
    max_new_tokens: int,
) -> list[tuple[str, tuple[int, ...]]]:
    """Greedy answers, by the code that `ask` uses: text and token ids, the token that ended it included."""
    settings = DecodeSettings(max_new_tokens=max_new_tokens)
    n_entries = len(backbone.prefix_ids) + sum(cache.n_kept for cache in caches)
    generator, results = Generator(backbone, layout=layout), []
    # Decoding computes one row of logits a question; what is large is its copy of the cache.
    for part in batches(backbone, len(questions), n_entries=n_entries + max_new_tokens, n_tokens=1):
        for generation in generator.generate_batch(questions[part], caches, settings=settings):
            results.append((generation.text.strip(), generation.token_ids))
    return results


def teach(
    backbone: Backbone, full: DistilledCache, case: Case, encoded: Sequence[EncodedQuery], task: Task, *, layout: Layout
) -> list[TeacherAnswer]:
    """The full model's answers to all questions of a document, and its log-probabilities there.

    They come from one teacher-forced pass, as those of every method do, and not from decoding: in bfloat16 the two
    differ in the last bits, and the full cache would have a KL to itself.
    """
    if task.kl_on == "answer":
        texts = [query.text for query in case.queries]
        said = answers(backbone, [full], texts, layout=layout, max_new_tokens=task.max_new_tokens)
    else:
        said = [("", query.reference) for query in encoded]
    rows = [ids[:KL_TOKENS] for _, ids in said]
    longest = max(len(query.prompt) for query in encoded) + KL_TOKENS
    taught: list[TeacherAnswer] = []
    for part in batches(backbone, len(rows), n_entries=full.n_kept + len(backbone.prefix_ids), n_tokens=longest):
        asked = Asked(backbone, [full], [query.prompt for query in encoded[part]], layout=layout, n_new=KL_TOKENS)
        for log_probs, ids, (text, all_ids) in zip(asked.follow(rows[part]), rows[part], said[part], strict=True):
            taught.append(TeacherAnswer(ids=ids, log_probs=log_probs, text=text, whole=len(ids) == len(all_ids)))
    return taught
