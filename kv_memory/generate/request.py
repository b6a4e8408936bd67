"""Request: the state of one answer while it is decoded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, DecodeTimeoutError
from kv_memory.generate.answer import Answer
from kv_memory.generate.constrain import JsonConstraint
from kv_memory.generate.text_stream import TextStream
from kv_memory.generate.turns import Prompt
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import FirstToken
from kv_memory.model.kv_cache import PositionedCache

AHEAD = 16  # most pieces decoded before they are taken: a slow consumer's request then pauses until it takes some
_DEFAULTS = DecodeSettings()


class Request:
    """One answer to decode: its cache, its tokens and text so far, its sampler and times. A `Scheduler` decodes it.

    Args:
        backbone: The model; the same for all requests of a scheduler.
        prompt: Tokens to prefill.
        cache: Cache to prefill them into, with room for prompt and answer; the request consumes it.
        settings: Decoding settings.
        first: Logits of the first token, `(vocab_size,)`, if the prompt is in the cache already; else None.
        n_cached: Entries of the cache that count as cached.
        so_far: The answer before decoding, with the tokens spent already, to which the request adds its own.
        start_s: `time.perf_counter()` at the call; None for now.

    Attributes:
        pieces: Decoded text that nobody has taken yet; one piece a token, which may be empty.
        ahead: Number of pieces at which decoding pauses until some are taken.
        error: Error that ended the request, until it is raised.
        over: Whether nothing more will be decoded.
        waiter: Completed when the request has news, or shall lead; None if nobody waits.

    Raises:
        ConfigError: The prompt has no tokens, or the JSON schema cannot be followed.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        cache: PositionedCache,
        settings: DecodeSettings | None = None,
        *,
        first: torch.Tensor | None = None,
        n_cached: int = 0,
        so_far: Answer | None = None,
        start_s: float | None = None,
    ) -> None:
        if not prompt.ids:
            raise ConfigError("the prompt has no tokens", where="prompt", next_step="Pass a question.")
        self._start_s = time.perf_counter() if start_s is None else start_s
        self._settings = settings = settings or _DEFAULTS
        self.backbone = backbone
        self._so_far = so_far or Answer()
        self._n_prompt, self._n_cached = len(prompt.ids), n_cached
        self.cache: PositionedCache | None = cache
        self.pieces: deque[str] = deque()
        self.ahead: float = AHEAD
        self.error: BaseException | None = None
        self.over = False
        self.waiter: Future[None] | None = None
        self._todo = list(prompt.ids)  # tokens to prefill next
        stop = (*settings.stop, *(backbone.prompt.stop if prompt.behind_prefix else ()))
        if settings.json_schema is not None:
            stop = settings.stop  # the schema determines where the answer ends
        self._text = TextStream(backbone.tokenizer, stop=stop)
        self._choose = _sampler(settings, backbone.device)
        self._constraint = None if settings.json_schema is None else JsonConstraint(backbone, settings.json_schema)
        self._takes_likeliest = settings.temperature == 0 and self._constraint is None
        self._opening = FirstToken(
            tokenizer=backbone.tokenizer, end_ids=backbone.end_ids, behind=prompt.ids[-1] if prompt.ids else None
        )
        self._ttft_s = self._total_s = 0.0
        if first is not None:
            self._todo = []
            self.take(first, int(first.argmax()))

    @property
    def paused(self) -> bool:
        """Whether decoding pauses until some pieces are taken."""
        return len(self.pieces) >= self.ahead

    def next_ids(self, limit: int) -> list[int]:
        """Tokens to prefill in the next pass, at most `limit` of a prompt; none if the limit is 0."""
        return self._todo if len(self._todo) == 1 else self._todo[:limit]

    def prefilled(self, n: int, logits: torch.Tensor, likeliest: int) -> None:
        """Note that `n` tokens are in the cache; if they were the last, `take` the next one from their logits."""
        self._todo = self._todo[n:]
        if not self._todo and not self.over:
            self.take(logits, likeliest)

    def take(self, logits: torch.Tensor, likeliest: int) -> None:
        """Pick the next token from its logits, `(vocab_size,)`; `likeliest` has the largest."""
        text, constraint = self._text, self._constraint
        is_last = len(text.token_ids) + 1 == self._settings.max_new_tokens
        if self._takes_likeliest and text.begun:
            token = likeliest
        else:
            logits = logits if constraint is None else constraint.mask(logits)
            if text.begun:
                token = self._choose(logits)
            else:
                token = self._opening.pick(self._choose, logits, text.token_ids, is_last=is_last)
        self._total_s = time.perf_counter() - self._start_s
        self._ttft_s = self._ttft_s or self._total_s
        complete = constraint is not None and constraint.push(token)
        piece = text.push(token, is_end=token in self.backbone.end_ids, is_last=is_last, is_complete=complete)
        self._todo = [token]
        self.pieces.append(piece)
        if text.finished:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """Decode nothing more, and free the cache; the text stays."""
        self.cache = None
        self.error = error
        self.over = True

    def left_s(self) -> float | None:
        """Seconds until the time limit; None without one."""
        limit_s = self._settings.timeout_s
        return None if limit_s is None else limit_s - (time.perf_counter() - self._start_s)

    def check_time(self) -> None:
        """End with a `DecodeTimeoutError` if the time limit is over."""
        left_s = self.left_s()
        if left_s is not None and left_s < 0 and not self.over:
            what = (
                f"the answer is not complete after {self._settings.timeout_s:g} s; {len(self._text.token_ids):,} tokens"
            )
            step = "Allow more time, lower max_new_tokens, or stream to get the partial answer."
            self.end(DecodeTimeoutError(f"{what} were decoded", where="timeout_s", next_step=step))

    @property
    def answer(self) -> Answer:
        """The answer, as far as it is decoded."""
        so_far, text = self._so_far, self._text
        return replace(
            so_far,
            text=text.text.strip() if so_far.question else text.text,
            token_ids=tuple(text.token_ids),
            finish_reason=text.finish_reason,
            n_prompt_tokens=so_far.n_prompt_tokens + self._n_prompt,
            n_cached_tokens=so_far.n_cached_tokens + self._n_cached,
            ttft_s=self._ttft_s,
            total_s=self._total_s,
            next_step=text.next_step,
        )


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
