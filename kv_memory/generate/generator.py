"""Generator: prefills a question after composed caches and decodes the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from collections.abc import Generator as Steps
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.errors import DecodeTimeoutError
from kv_memory.generate.answer import Answer, AnswerStream, TextStream, iterate_in_thread
from kv_memory.generate.compose import compose
from kv_memory.generate.constrain import JsonConstraint
from kv_memory.generate.turns import Prompt
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import FirstToken
from kv_memory.model.kv_cache import PositionedCache

_DEFAULTS = DecodeSettings()


class Generator:
    """Answers questions from distilled caches. Safe to use from several threads.

    Hugging Face's `generate` was rejected: it streams by pushing from its own thread, cannot give each row of a batch
    its own seed and stop, and derives positions from the length of the cache. Its logits warpers are used.

    Args:
        backbone: The model.
        layout: Placement of documents, see `compose`.
    """

    def __init__(self, backbone: Backbone, *, layout: Layout = "source") -> None:
        self.backbone = backbone
        self.layout: Layout = layout

    def generate(
        self, question: str, caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> Answer:
        """Answer one question; see `generate_batch` for arguments and errors."""
        return self.start([question], caches, settings=settings).decode()[0]

    def generate_batch(
        self, questions: Sequence[str], caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> list[Answer]:
        """Answer several questions about the same documents as one batch.

        Args:
            questions: Questions to answer; may be empty.
            caches: Distilled caches of the documents, in order.
            settings: Decoding settings.

        Raises:
            ContextWindowError: Documents, question and answer do not fit the model. Raised before any work.
            FingerprintMismatchError: A cache belongs to another model or prompt.
        """
        if not questions:
            return []
        return self.start(questions, caches, settings=settings).decode()

    def stream(
        self, question: str, caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> AnswerStream:
        """Answer one question piece by piece; the pieces joined are the answer.

        Arguments and errors as in `generate_batch`. Errors before decoding are raised by the call itself, not by the
        first piece.
        """
        return AnswerStream(self.start([question], caches, settings=settings), Answer())

    async def astream(
        self, question: str, caches: Sequence[DistilledCache] = (), *, settings: DecodeSettings | None = None
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: every step runs in a thread, so that the model never blocks the event loop."""
        pieces = await asyncio.to_thread(self.stream, question, caches, settings=settings)
        async for piece in iterate_in_thread(pieces):
            yield piece

    def start(
        self,
        questions: Sequence[str],
        caches: Sequence[DistilledCache] = (),
        *,
        texts: Sequence[str] = (),
        settings: DecodeSettings | None = None,
    ) -> Run:
        """Start a batch, for callers that need both the pieces and the statistics.

        Arguments and errors as in `generate_batch`, but there is at least one question. `texts` are documents to
        prefill as text after the caches and before the question: plain RAG, for comparison.
        """
        documents = [token for text in texts for token in self.backbone.encode_document(text)]
        prompts = [Prompt(documents + self.backbone.encode_question(q), behind_prefix=True) for q in questions]
        return Run(self.backbone, prompts, caches, self.layout, settings)


def _sampler(settings: DecodeSettings, device: torch.device) -> Callable[[torch.Tensor], int]:
    """A function that picks the tokens of one answer from `(vocab_size,)` logits, with its own random generator."""
    if settings.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator(device=device)
    if settings.seed is None:
        generator.seed()
    else:
        generator.manual_seed(settings.seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    none: Any = torch.empty(1, 0, dtype=torch.long)

    def pick(logits: torch.Tensor) -> int:
        scores = warpers(none, logits[None].float())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return pick


class Run:
    """One batch: composed on construction, decoded by `steps`, summarised by `results`. See `Generator.start`.

    `read` is the state of prompts that are prefilled already: their cache, which the run consumes, and the logits of
    the next token, `(rows, vocab_size)`. `so_far` are the answers before decoding, one a prompt: what is known of them,
    and the tokens and seconds spent already, to which the run adds its own.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        caches: Sequence[DistilledCache],
        layout: Layout,
        settings: DecodeSettings | None = None,
        *,
        read: tuple[PositionedCache, torch.Tensor] | None = None,
        so_far: Sequence[Answer] = (),
    ) -> None:
        self._start_s = time.perf_counter()
        self._backbone = backbone
        self._settings = settings = settings or _DEFAULTS
        self._so_far = so_far or [Answer()] * len(prompts)
        self._lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        width = int(self._lengths.max())
        self._ids = torch.tensor([prompt.ids + [0] * (width - len(prompt.ids)) for prompt in prompts])
        room = settings.max_new_tokens
        self._cache: PositionedCache | None
        behind_prefix = prompts[0].behind_prefix
        self._first = None if read is None else read[1]
        if read is not None:
            self._cache = read[0]
        elif behind_prefix:
            self._cache = compose(
                backbone, caches, layout=layout, n_question=width, n_new=room, batch_size=len(prompts)
            )
        else:
            backbone.check_positions(width + room, what=f"a prompt of {width:,} and an answer of up to {room:,} tokens")
            self._cache = backbone.empty_cache(width + room, batch_size=len(prompts))
        self._n_cached = (len(backbone.prefix_ids) if behind_prefix else 0) + sum(cache.n_kept for cache in caches)
        stop = (*settings.stop, *(backbone.prompt.stop if behind_prefix else ()))
        if settings.json_schema is not None:
            stop = settings.stop  # the schema determines where the answer ends
        self._texts = [TextStream(backbone.tokenizer, stop=stop) for _ in prompts]
        self._samplers = [_sampler(settings, backbone.device) for _ in prompts]
        self._constraints = [
            None if settings.json_schema is None else JsonConstraint(backbone, settings.json_schema) for _ in prompts
        ]
        self._openings = [
            FirstToken(
                tokenizer=backbone.tokenizer, end_ids=backbone.end_ids, behind=prompt.ids[-1] if prompt.ids else None
            )
            for prompt in prompts
        ]
        self._ttft_s = 0.0
        self._total_s = [0.0] * len(prompts)

    def decode(self) -> list[Answer]:
        """Decode to the end and return the answers; errors as in `steps`."""
        for _ in self.steps():
            pass
        return self.results()

    def close(self) -> None:
        """Free the cache; the decoded text stays."""
        self._cache = None

    @torch.no_grad()
    def steps(self) -> Steps[list[str], None, None]:
        """Decode token by token; each step yields the new text of every row, empty for rows that have ended.

        Raises:
            DecodeTimeoutError: Decoding takes longer than `DecodeSettings.timeout_s`.
        """
        assert self._cache is not None, "a run is decoded once"
        # Only this frame holds the cache from here on: it is freed with the last step, or when the steps are closed.
        backbone, cache, self._cache = self._backbone, self._cache, None
        logits = self._first
        if logits is None:
            ragged = bool((self._lengths != self._lengths[0]).any())
            logits = backbone.logits(self._ids, cache, lengths=self._lengths if ragged else None)
        rows = list(range(len(self._texts)))  # indices of rows still being decoded
        for step in range(self._settings.max_new_tokens):
            last = step + 1 == self._settings.max_new_tokens
            tokens = [self._pick(row, of_row, last) for row, of_row in zip(rows, logits, strict=True)]
            now_s = time.perf_counter() - self._start_s
            self._ttft_s = self._ttft_s or now_s
            pieces = [""] * len(self._texts)
            for row, token in zip(rows, tokens, strict=True):
                text, constraint = self._texts[row], self._constraints[row]
                self._total_s[row] = now_s
                complete = constraint is not None and constraint.push(token)
                pieces[row] = text.push(token, is_end=token in backbone.end_ids, is_last=last, is_complete=complete)
            yield pieces
            going = [i for i, row in enumerate(rows) if not self._texts[row].finished]
            if not going:
                return
            self._check_time(step + 1)
            if len(going) < len(rows):
                cache.keep_rows(going)
                rows, tokens = [rows[i] for i in going], [tokens[i] for i in going]
            logits = backbone.logits(torch.tensor(tokens)[:, None], cache)

    def _pick(self, row: int, logits: torch.Tensor, is_last: bool) -> int:
        text, constraint, choose = self._texts[row], self._constraints[row], self._samplers[row]
        logits = logits if constraint is None else constraint.mask(logits)
        if text.begun:
            return choose(logits)
        return self._openings[row].pick(choose, logits, text.token_ids, is_last=is_last)

    def _check_time(self, n_tokens: int) -> None:
        limit_s = self._settings.timeout_s
        if limit_s is not None and time.perf_counter() - self._start_s > limit_s:
            raise DecodeTimeoutError(
                f"the answer is not complete after {limit_s:g} s; {n_tokens:,} tokens were decoded",
                where="timeout_s",
                next_step="Allow more time, lower max_new_tokens, or stream to get the partial answer.",
            )

    def results(self) -> list[Answer]:
        """The answers, after `steps` has ended."""
        return [
            replace(
                so_far,
                text=text.text.strip() if so_far.question else text.text,
                token_ids=tuple(text.token_ids),
                finish_reason=text.finish_reason,
                n_prompt_tokens=so_far.n_prompt_tokens + int(length),
                n_cached_tokens=so_far.n_cached_tokens + self._n_cached,
                ttft_s=so_far.ttft_s + self._ttft_s,
                total_s=so_far.total_s + total_s,
                next_step=text.next_step,
            )
            for so_far, text, length, total_s in zip(
                self._so_far, self._texts, self._lengths, self._total_s, strict=True
            )
        ]
