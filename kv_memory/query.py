"""Reader: replies from referenced distilled caches, the basis of the facade and of the framework integrations."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.keep import Keep
from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings, Layout, StorageName, check_keep_ratio
from kv_memory.errors import CacheNotFoundError, ConfigError, CorruptCacheError, StoreError
from kv_memory.generate import Generator, Prompt, Run, Turn, encode_chat, encode_text_prompt, encode_turns
from kv_memory.store import Store
from kv_memory.tracing import span

__all__ = ["Reader", "Reference", "Reply", "ReplyStream", "key_of"]

_REFERENCE = re.compile(r"(?P<key>[0-9a-f]{64})(?:@(?P<ratio>[0-9.e-]+))?(?:/(?P<collection>.+))?", re.DOTALL)
_ADD_AGAIN = (
    "Its text is not kept, so it cannot be used instead: add the document again, or run `kv-memory add --stale` if it "
    "is an unchanged file."
)


def key_of(text: str) -> str:
    """The key of a text's distilled caches: the SHA-256 of its UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference to the distilled cache of one text.

    Its string form is `KEY`, `KEY@KEEP_RATIO` or `KEY@KEEP_RATIO/COLLECTION`, which fits wherever a framework takes
    ids. The text is not part of the string.

    Attributes:
        key: Key of the text, see `key_of`.
        text: Text to prefill if there is no intact cache.
        keep_ratio: keep_ratio of the cache; None means the store's setting.
        collection: Collection of the cache; None means the reader's own.
    """

    key: str
    text: str | None = None
    keep_ratio: float | None = None
    collection: str | None = None

    def __str__(self) -> str:
        ratio = "" if self.keep_ratio is None else f"@{self.keep_ratio}"  # every digit: it is a lookup key
        return f"{self.key}{ratio}" + ("" if self.collection is None else f"/{self.collection}")

    @classmethod
    def parse(cls, value: str | Reference) -> Reference:
        """Inverse of `str`.

        Raises:
            ConfigError: The string is not a reference.
        """
        if isinstance(value, Reference):
            return value
        found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ConfigError(
                "not a reference to a distilled cache",
                where=repr(value)[:40],  # shortened: it may be a whole text
                next_step="References begin with the SHA-256 of a text; retrievers of kv_memory.integrations set them.",
            )
        try:
            ratio = None if found["ratio"] is None else check_keep_ratio(float(found["ratio"]))
        except ValueError as error:
            raise ConfigError(f"invalid keep_ratio in cache reference: {error}", where=value[:120]) from error
        return cls(key=found["key"], keep_ratio=ratio, collection=found["collection"])


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply and its cost.

    Attributes:
        text: Decoded text, without the stop string.
        finish_reason: `stop` (end token, stop string, or JSON complete) or `length` (cut at max_new_tokens).
        n_prompt_tokens: Tokens prefilled for this reply, including texts that replace caches.
        n_cached_tokens: Cache entries used instead of prefill, including the shared prefix.
        n_new_tokens: Number of decoded tokens.
        ttft_s: Seconds from the call to the first token: loading from the store, composing, prefill.
        total_s: Seconds from the call to the last token.
        damaged: Keys of damaged caches. Each was quarantined and its text prefilled instead. The text was then
            compressed again, unless it does not match the key or the store cannot take the cache.
        next_step: Advice if the text is empty; None otherwise.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    n_prompt_tokens: int
    n_cached_tokens: int
    n_new_tokens: int
    ttft_s: float
    total_s: float
    damaged: tuple[str, ...] = ()
    next_step: str | None = None


class ReplyStream(Iterator[str]):
    """Pieces of a reply as they are decoded; closing it stops decoding."""

    def __init__(self, run: Run, loaded: _Loaded) -> None:
        self._run = run
        self._loaded = loaded._replace(caches=[])  # freed: they are composed already
        self._steps = run.steps()

    def __next__(self) -> str:
        for step in self._steps:
            if step[0]:
                return step[0]
        raise StopIteration

    def each_token(self) -> Iterator[str]:
        """The same pieces, plus an empty one for every token that yields no text yet."""
        return (step[0] for step in self._steps)

    @property
    def reply(self) -> Reply:
        """The whole reply; decodes the remaining tokens first.

        For a closed stream, the reply holds the tokens decoded before it was closed.
        """
        for _ in self._steps:
            pass
        return _replies(self._run, self._loaded)[0]

    def close(self) -> None:
        """Stop decoding and free its memory."""
        self._steps.close()  # type: ignore[attr-defined]
        self._run.close()


class _Loaded(NamedTuple):
    """Caches in the order of their references; `n_text` of their tokens were prefilled by this call."""

    caches: list[DistilledCache]
    n_text: int
    damaged: tuple[str, ...]
    elapsed_s: float


class Reader:
    """Replies from distilled caches. Safe to use from several threads.

    Args:
        store: Store of the caches.
        compressor: Compressor whose fingerprint the caches must have; it compresses the texts of missing or damaged
            caches.
        keep_ratio: keep_ratio of caches whose reference names none; a `Keep` gives each text its own.
        layout: Placement of documents, see `generate.compose`.
        storage: Storage type of caches that are compressed again.
        store_of: Function that returns the store of another collection.
    """

    def __init__(
        self,
        store: Store,
        compressor: Compressor,
        *,
        keep_ratio: float | Keep,
        layout: Layout,
        storage: StorageName = "auto",
        store_of: Callable[[str], Store] | None = None,
    ) -> None:
        self._store = store
        self._compressor = compressor
        self._keep_ratio = keep_ratio
        self._storage = storage
        self._store_of = store_of
        self._generator = Generator(compressor.backbone, layout=layout)

    def has(self, text: str) -> bool:
        """Whether there is a cache of exactly this text under the current settings."""
        return self.has_key(key_of(text))

    def has_key(self, key: str) -> bool:
        """`has`, by the text's key."""
        return self._store.has(key, self._compressor.fingerprint(), self._keep_ratio)

    def sound(self, text: str) -> bool:
        """Whether there is such a cache and its bytes are intact.

        Loading checks the bytes too; this method has no side effect.
        """
        return self._store.sound(key_of(text), self._compressor.fingerprint(), self._keep_ratio)

    def check(self, text: str) -> None:
        """Raise unless `has`.

        Raises:
            CacheNotFoundError: There is no such cache; the error names the keep ratios that exist.
            FingerprintMismatchError: The cache was made by another model, adapter or prompt.
        """
        if not self.has(text):
            self._store.get(key_of(text), self._compressor.fingerprint(), self._keep_ratio)

    def reply(
        self,
        turns: Sequence[Turn],
        references: Sequence[Reference] = (),
        *,
        texts: Sequence[str] = (),
        settings: DecodeSettings | None = None,
    ) -> ReplyStream:
        """Reply to a conversation, from distilled caches after the shared prefix.

        Args:
            turns: The conversation; its last turn is the user's.
            references: Caches to place before the conversation, in this order.
            texts: Documents to prefill as text after the caches.
            settings: Decoding settings.

        Raises:
            CacheNotFoundError: A reference without a text has no cache.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            CorruptCacheError: A cache is damaged, and there is no text to replace it.
            ContextWindowError: The caches, texts and conversation do not fit the model.
            ConfigError: The turns are invalid, see `encode_turns`.
        """
        backbone = self._compressor.backbone
        prompt = encode_turns(backbone, turns)
        documents = [token for text in texts for token in backbone.encode_document(text)]
        loaded = self.load(references)
        prompt = Prompt([*documents, *prompt.ids], behind_prefix=True)
        return ReplyStream(self._generator.start_prompt(prompt, loaded.caches, settings=settings), loaded)

    def reply_alone(self, turns: Sequence[Turn], *, settings: DecodeSettings | None = None) -> ReplyStream:
        """Reply to a conversation without documents, in the model's own chat template. Errors as in `reply`."""
        return self._start_alone(encode_chat(self._compressor.backbone, turns), settings)

    def complete(self, text: str, *, settings: DecodeSettings | None = None) -> ReplyStream:
        """Continue a text without any template. Errors as in `reply`."""
        return self._start_alone(encode_text_prompt(self._compressor.backbone, text), settings)

    def reply_batch(
        self, questions: Sequence[str], references: Sequence[Reference], *, settings: DecodeSettings | None = None
    ) -> list[Reply]:
        """Reply to several questions about the same documents as one batch. Errors as in `reply`."""
        if not questions:
            return []
        loaded = self.load(references)
        run = self._generator.start(questions, loaded.caches, settings=settings)
        for _ in run.steps():
            pass
        return _replies(run, loaded)

    def _start_alone(self, prompt: Prompt, settings: DecodeSettings | None) -> ReplyStream:
        nothing = _Loaded([], 0, (), 0.0)
        return ReplyStream(self._generator.start_prompt(prompt, settings=settings), nothing)

    def load(self, references: Sequence[Reference]) -> _Loaded:
        """The caches of the references; a missing or damaged cache is replaced by the full cache of its text."""
        with span("load", collection=self._store.collection, n_references=len(references)):
            return self._load(references)

    def _load(self, references: Sequence[Reference]) -> _Loaded:
        start_s = time.perf_counter()
        fingerprint = self._compressor.fingerprint()
        caches: list[DistilledCache] = []
        damaged: list[str] = []
        n_text = 0
        for reference in references:
            store = self._store
            if reference.collection not in (None, store.collection):
                store = self._other_store(reference)
            ratio = self._keep_ratio if reference.keep_ratio is None else reference.keep_ratio
            text = reference.text
            try:
                cache = store.get(reference.key, fingerprint, ratio)
            except CacheNotFoundError:
                if text is None:
                    raise
                cache = self._compressor.compress(text, keep_ratio=1.0)
                n_text += cache.n_tokens
            except CorruptCacheError as error:
                text = store.text(reference.key) if text is None else text
                if text is None:
                    raise CorruptCacheError(error.what, where=error.where, next_step=_ADD_AGAIN) from error
                cache = self._compressor.compress(text, keep_ratio=1.0)
                n_text += cache.n_tokens
                damaged.append(reference.key)
                if key_of(text) != reference.key:  # stored under this key, it would pass for the other text's cache
                    caches.append(cache)
                    continue
                with contextlib.suppress(StoreError):  # the reply does not depend on storing it
                    again = self._compressor.compress(text, keep_ratio=self._compressor.ratio_for(text, ratio))
                    store.put(reference.key, again, storage=self._storage)
            caches.append(cache)
        return _Loaded(caches, n_text, tuple(damaged), time.perf_counter() - start_s)

    def _other_store(self, reference: Reference) -> Store:
        if self._store_of is None or reference.collection is None:
            raise ConfigError(
                f"this reader can access collection {self._store.collection!r} only", where=f"collection of {reference}"
            )
        return self._store_of(reference.collection)


def _replies(run: Run, loaded: _Loaded) -> list[Reply]:
    return [
        Reply(
            text=generation.text,
            finish_reason=generation.finish_reason,
            n_prompt_tokens=generation.n_prompt_tokens + loaded.n_text,
            n_cached_tokens=generation.n_cached_tokens - loaded.n_text,
            n_new_tokens=len(generation.token_ids),
            ttft_s=loaded.elapsed_s + generation.ttft_s,
            total_s=loaded.elapsed_s + generation.total_s,
            damaged=loaded.damaged,
            next_step=generation.next_step,
        )
        for generation in run.results()
    ]
