"""Reader: replies from distilled caches, named by references. What the facade and the frameworks' adapters stand on."""

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
    "Its text is not kept, so it cannot be read instead: add the document again, or run `kv-memory add --stale` if it "
    "is a file that has not changed."
)


def key_of(text: str) -> str:
    """The key of a text's distilled caches: the SHA-256 of its UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a reply is read from: the distilled cache of one text.

    As a string it is `KEY`, `KEY@KEEP_RATIO` or `KEY@KEEP_RATIO/COLLECTION`, and goes wherever a framework takes ids;
    the text is no part of that.

    Attributes:
        key: See `key_of`.
        text: Read instead where there is no sound cache.
        keep_ratio: Of the cache; the store's setting if None.
        collection: Where it lies; the reader's own if None.
    """

    key: str
    text: str | None = None
    keep_ratio: float | None = None
    collection: str | None = None

    def __str__(self) -> str:
        ratio = "" if self.keep_ratio is None else f"@{self.keep_ratio}"  # every digit: caches are found by it
        return f"{self.key}{ratio}" + ("" if self.collection is None else f"/{self.collection}")

    @classmethod
    def parse(cls, value: str | Reference) -> Reference:
        """Inverse of `str`.

        Raises:
            ConfigError: The string is no reference.
        """
        if isinstance(value, Reference):
            return value
        found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ConfigError(
                "not a reference to a distilled cache",
                where=repr(value)[:40],  # it may be a text
                next_step="References begin with the SHA-256 of a text; retrievers of kv_memory.integrations set them.",
            )
        try:
            ratio = None if found["ratio"] is None else check_keep_ratio(float(found["ratio"]))
        except ValueError as error:
            raise ConfigError(f"a reference with a keep_ratio that is none: {error}", where=value[:120]) from error
        return cls(key=found["key"], keep_ratio=ratio, collection=found["collection"])


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply and what it cost.

    Attributes:
        text: As decoded, without the stop string.
        finish_reason: `stop` (end token, stop string, or JSON complete) or `length` (cut at max_new_tokens).
        n_prompt_tokens: Tokens prefilled for it, texts read in place of caches included.
        n_cached_tokens: Entries read from caches instead, the shared prefix included.
        n_new_tokens: Decoded.
        ttft_s: From the call to the first token: reading the store, composing, prefill.
        total_s: From the call to the last token.
        damaged: Keys whose cache was damaged: it was quarantined and made again, and the text was read.
        next_step: What to try where the text is empty; None where it is not.
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
        self._loaded = loaded._replace(caches=[])  # they are composed
        self._steps = run.steps()

    def __next__(self) -> str:
        for step in self._steps:
            if step[0]:
                return step[0]
        raise StopIteration

    def each_token(self) -> Iterator[str]:
        """The same pieces, and an empty one for every token after which there is nothing to show yet."""
        return (step[0] for step in self._steps)

    @property
    def reply(self) -> Reply:
        """The whole reply; decodes what has not been taken yet. Of a closed stream: what there was until then."""
        for _ in self._steps:
            pass
        return _replies(self._run, self._loaded)[0]

    def close(self) -> None:
        """Stop decoding, and free what it takes."""
        self._steps.close()  # type: ignore[attr-defined]
        self._run.close()


class _Loaded(NamedTuple):
    """Caches in the order of their references; `n_text` tokens of them were prefilled just now."""

    caches: list[DistilledCache]
    n_text: int
    damaged: tuple[str, ...]
    elapsed_s: float


class Reader:
    """Replies from distilled caches. Safe to use from several threads.

    Args:
        store: Where the caches lie.
        compressor: Whose caches are wanted; reads the texts of those that are missing or damaged.
        keep_ratio: Of the caches, where a reference names none; a `Keep` means another one for each text.
        layout: How documents are placed, see `generate.compose`.
        storage: How a cache that is made again is stored.
        store_of: The store of another collection.
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
        """Whether there is a cache of exactly this text under the present settings."""
        return self.has_key(key_of(text))

    def has_key(self, key: str) -> bool:
        """`has`, by the text's key."""
        return self._store.has(key, self._compressor.fingerprint(), self._keep_ratio)

    def sound(self, text: str) -> bool:
        """`has`, and its bytes are those that were written. Reading finds that out too; here it changes nothing."""
        return self._store.sound(key_of(text), self._compressor.fingerprint(), self._keep_ratio)

    def check(self, text: str) -> None:
        """Raise unless `has`.

        Raises:
            CacheNotFoundError: There is none; names the keep ratios there are.
            FingerprintMismatchError: There is one, made by another model, adapter or prompt.
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
        """Reply to a conversation, from distilled caches behind the shared prefix.

        Args:
            turns: The conversation; the last is the user's.
            references: What is read before it, in this order.
            texts: Documents to read as text behind those.
            settings: How to decode.

        Raises:
            CacheNotFoundError: A reference without a text has no cache.
            FingerprintMismatchError: Its cache was made by another model, adapter or prompt.
            CorruptCacheError: Its cache is damaged, and there is no text to read instead.
            ContextWindowError: All of it does not fit the model.
            ConfigError: The turns are none; see `encode_turns`.
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
        """Go on with a text as it is, without any template. Errors as in `reply`."""
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
        """The references' caches; in the place of missing and damaged ones the plain cache of their text."""
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
                if key_of(text) != reference.key:  # a cache of it would be found as that of the other text
                    caches.append(cache)
                    continue
                with contextlib.suppress(StoreError):  # a store that cannot take it is no obstacle to a reply
                    again = self._compressor.compress(text, keep_ratio=self._compressor.ratio_for(text, ratio))
                    store.put(reference.key, again, storage=self._storage)
            caches.append(cache)
        return _Loaded(caches, n_text, tuple(damaged), time.perf_counter() - start_s)

    def _other_store(self, reference: Reference) -> Store:
        if self._store_of is None or reference.collection is None:
            raise ConfigError(
                f"this reader sees collection {self._store.collection!r} only", where=f"collection of {reference}"
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
