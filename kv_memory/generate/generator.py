"""Generator: from questions and distilled caches to answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.generate.answer import Answer, AnswerStream, iterate_in_thread
from kv_memory.generate.compose import compose
from kv_memory.generate.request import Request
from kv_memory.generate.scheduler import Scheduler
from kv_memory.generate.turns import Prompt
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

_DEFAULTS = DecodeSettings()


class Generator:
    """Answers questions from distilled caches. Safe to use from several threads, whose answers are decoded together.

    Hugging Face's `generate` was rejected: it streams by pushing from its own thread, cannot give each row of a batch
    its own seed and stop, and derives positions from the length of the cache. Its logits warpers are used.

    Args:
        backbone: The model.
        layout: Placement of documents, see `compose`.
        scheduler: Scheduler of the model, to decode together with others; None for one of its own.
    """

    def __init__(self, backbone: Backbone, *, layout: Layout = "source", scheduler: Scheduler | None = None) -> None:
        self.backbone = backbone
        self.layout: Layout = layout
        self.scheduler = Scheduler() if scheduler is None else scheduler

    def generate(
        self, question: str, caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> Answer:
        """Answer one question; arguments and errors as in `stream`."""
        return self.stream(question, caches, settings=settings).answer

    def generate_batch(
        self, questions: Sequence[str], caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> list[Answer]:
        """Answer several questions about the same documents together; there may be none. Otherwise as in `stream`."""
        return self.reply_batch([self._prompt(question) for question in questions], caches, settings=settings)

    def stream(
        self,
        question: str,
        caches: Sequence[DistilledCache] = (),
        *,
        texts: Sequence[str] = (),
        settings: DecodeSettings | None = None,
    ) -> AnswerStream:
        """Answer one question piece by piece; the pieces joined are the answer.

        Errors before decoding are raised by the call itself, not by the first piece.

        Args:
            question: The question.
            caches: Distilled caches of the documents, in order.
            texts: Documents to prefill as text after the caches and before the question: plain RAG, for comparison.
            settings: Decoding settings.

        Raises:
            ContextWindowError: Documents, question and answer do not fit the model. Raised before any work.
            FingerprintMismatchError: A cache belongs to another model or prompt.
            QueueFullError: More questions wait for the model than its queue admits.
        """
        return self.reply(self._prompt(question, texts), caches, settings=settings)

    async def astream(
        self, question: str, caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: every step runs in a thread, so that the model never blocks the event loop."""
        pieces = await asyncio.to_thread(self.stream, question, caches, settings=settings)
        async for piece in iterate_in_thread(pieces):
            yield piece

    def reply(
        self,
        prompt: Prompt,
        caches: Sequence[DistilledCache] = (),
        *,
        settings: DecodeSettings | None = None,
        so_far: Answer | None = None,
        start_s: float | None = None,
    ) -> AnswerStream:
        """`stream` for an encoded prompt; `so_far` and `start_s` as in `Request`."""
        start_s = time.perf_counter() if start_s is None else start_s
        cache = self._compose([prompt], caches, settings or _DEFAULTS)
        request = self._request(prompt, caches, settings, so_far, start_s, lambda _: cache)
        return AnswerStream(self.scheduler, request, so_far or Answer())

    def reply_batch(
        self,
        prompts: Sequence[Prompt],
        caches: Sequence[DistilledCache] = (),
        *,
        settings: DecodeSettings | None = None,
        so_far: Sequence[Answer] = (),
        start_s: float | None = None,
    ) -> list[Answer]:
        """Answers to several encoded prompts behind the same caches, which are composed once; `so_far` one a prompt."""
        if not prompts:
            return []
        start_s = time.perf_counter() if start_s is None else start_s
        whole = self._compose(prompts, caches, settings or _DEFAULTS)
        known = so_far or [Answer()] * len(prompts)
        return self.scheduler.answers(
            partial(self._request, prompt, caches, settings, answer, start_s, lambda room: whole.copy(room=room))
            for prompt, answer in zip(prompts, known, strict=True)
        )

    def _request(
        self,
        prompt: Prompt,
        caches: Sequence[DistilledCache],
        settings: DecodeSettings | None,
        so_far: Answer | None,
        start_s: float,
        make_cache: Callable[[int], PositionedCache],
    ) -> Request:
        settings = settings or _DEFAULTS
        n_prefix = len(self.backbone.prefix_ids) if prompt.behind_prefix else 0
        return Request(
            self.backbone,
            prompt,
            make_cache(len(prompt.ids) + settings.max_new_tokens),
            settings,
            n_cached=n_prefix + sum(cache.n_kept for cache in caches),
            so_far=so_far,
            start_s=start_s,
        )

    def _compose(
        self, prompts: Sequence[Prompt], caches: Sequence[DistilledCache], settings: DecodeSettings
    ) -> PositionedCache:
        """The cache that all prompts follow, with room for the longest and its answer."""
        longest, room = max(len(prompt.ids) for prompt in prompts), settings.max_new_tokens
        if prompts[0].behind_prefix:
            return compose(self.backbone, caches, layout=self.layout, n_question=longest, n_new=room)
        self.backbone.check_positions(
            longest + room, what=f"a prompt of {longest:,} and an answer of up to {room:,} tokens"
        )
        return self.backbone.empty_cache(longest + room)

    def _prompt(self, question: str, texts: Sequence[str] = ()) -> Prompt:
        documents = [token for text in texts for token in self.backbone.encode_document(text)]
        return Prompt([*documents, *self.backbone.encode_question(question)], behind_prefix=True)
