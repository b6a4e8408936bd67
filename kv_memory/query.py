"""Reader: answers from referenced distilled caches, the basis of the facade and of the framework integrations."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.keep import Keep
from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings, check_choice, check_keep_ratio
from kv_memory.errors import CacheNotFoundError, ConfigError, CorruptCacheError, StoreError, TextNotKeptError
from kv_memory.generate import (
    Answer,
    AnswerStream,
    Generator,
    Prompt,
    ReadFrom,
    Scheduler,
    Turn,
    encode_chat,
    encode_text_prompt,
    encode_turns,
    place_ranked,
)
from kv_memory.retrieval.retriever import Hit
from kv_memory.settings import MemorySettings
from kv_memory.store import DocumentRecord, Store
from kv_memory.tracing import span

_REFERENCE = re.compile(r"(?P<key>[0-9a-f]{64})(?:@(?P<ratio>[0-9.e-]+))?(?:/(?P<collection>.+))?", re.DOTALL)
_ADD_AGAIN = (
    "Its text is not kept, so it cannot be used instead: add the document again, or run `kv-memory add --stale` if it "
    "is an unchanged file."
)


def key_of(text: str) -> str:
    """The key of a text's distilled caches: the SHA-256 of its UTF-8 bytes, in hex.

    Half a surrogate pair counts too; no stored text has one.
    """
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference to the distilled cache of one text.

    Its string form is `KEY`, `KEY@KEEP_RATIO` or `KEY@KEEP_RATIO/COLLECTION`, which fits wherever a framework takes
    ids. The text is not part of the string.

    Attributes:
        key: Key of the text, see `key_of`.
        text: Text to prefill if there is no intact cache.
        keep_ratio: keep_ratio of the cache; None means the cache there is, see `Reader`.
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


class Reader:
    """Answers from distilled caches. Safe to use from several threads.

    Args:
        store: Store of the caches.
        compressor: Compressor whose fingerprint the caches must have; it compresses the texts of missing or damaged
            caches.
        settings: Settings with the amount kept of the preferred caches, for references without a keep_ratio: of a text
            without such a cache, the newest one is taken.
        scheduler: Scheduler of the model, shared by all of its readers; None for one of its own.
    """

    def __init__(
        self, store: Store, compressor: Compressor, settings: MemorySettings, scheduler: Scheduler | None = None
    ) -> None:
        self._store = store
        self._compressor = compressor
        self._fingerprint = compressor.fingerprint()
        self._settings = settings
        self._generator = Generator(compressor.backbone, layout=settings.layout, scheduler=scheduler)

    def has(self, text: str) -> bool:
        """Whether there is a cache of exactly this text under the current settings, whatever its keep_ratio."""
        return self.has_key(key_of(text))

    def has_key(self, key: str) -> bool:
        """`has`, by the text's key."""
        return self._store.has(key, self._fingerprint, self._settings.keep)

    def sound(self, text: str) -> bool:
        """Whether there is such a cache and its bytes are intact.

        Loading checks the bytes too; this method has no side effect.
        """
        return self._store.sound(key_of(text), self._fingerprint, self._settings.keep)

    def check(self, text: str) -> None:
        """Raise unless `has`.

        Raises:
            CacheNotFoundError: There is no such cache.
            FingerprintMismatchError: The cache was made by another model, adapter or prompt.
        """
        if not self.has(text):
            self._store.get(key_of(text), self._fingerprint, self._settings.keep)

    def answer(
        self,
        question: str,
        hits: Sequence[Hit],
        *,
        settings: DecodeSettings | None = None,
        read_from: ReadFrom = "caches",
        start_s: float | None = None,
    ) -> AnswerStream:
        """Answer a question from passages of the store, best first; without any, the answer is empty.

        `start_s` as in `reply`, other arguments as in `KVMemory.ask`.

        Raises:
            TextNotKeptError: `read_from` is `text`, and the text of a passage is not kept.
            CacheNotFoundError: A passage has no cache. Other errors as in `reply`.
        """
        check_choice(read_from, ReadFrom, where="read_from")
        so_far = Answer(question=question, sources=tuple(hits), read_from=read_from)
        if not hits:
            nothing = replace(so_far, next_step="Use words that occur in the documents.")
            return AnswerStream(self._generator.scheduler, None, nothing)
        # No texts: a missing cache is an error here, and for a damaged one the text is taken from the store.
        references = [Reference(key=hit.text_sha256) for hit in hits] if read_from == "caches" else ()
        texts = texts_of(hits) if read_from == "text" else ()
        turns = [Turn("user", question)]
        return self.reply(
            turns, references, ranked=True, texts=texts, settings=settings, so_far=so_far, start_s=start_s
        )

    def answer_batch(
        self, questions: Sequence[str], document: DocumentRecord, *, settings: DecodeSettings | None = None
    ) -> list[Answer]:
        """Answer several questions from all passages of a document as one batch. Errors as in `reply`."""
        if not questions:
            return []
        hits = tuple(
            Hit(document_id=document.id, ordinal=i, score=1.0, text=p.text, text_sha256=p.text_sha256, metadata={})
            for i, p in enumerate(document.passages)
        )
        start_s = time.perf_counter()
        caches, loaded = self._load([Reference(key=hit.text_sha256) for hit in hits], Answer(sources=hits))
        backbone = self._compressor.backbone
        prompts = [Prompt(backbone.encode_question(question), behind_prefix=True) for question in questions]
        so_far = [replace(loaded, question=question) for question in questions]
        return self._generator.reply_batch(prompts, caches, settings=settings, so_far=so_far, start_s=start_s)

    def reply(
        self,
        turns: Sequence[Turn],
        references: Sequence[Reference] = (),
        *,
        ranked: bool = False,
        texts: Sequence[str] = (),
        settings: DecodeSettings | None = None,
        so_far: Answer | None = None,
        start_s: float | None = None,
    ) -> AnswerStream:
        """Reply to a conversation, from distilled caches after the shared prefix.

        Args:
            turns: The conversation; its last turn is the user's.
            references: Caches to place before the conversation, in this order.
            ranked: True if the references are best first; they are then placed by the settings `order` and `rank_bias`.
            texts: Documents to prefill as text after the caches.
            settings: Decoding settings.
            so_far: Answer as far as it is known: its question, its sources.
            start_s: `time.perf_counter()` when the question arrived, from which its times and `timeout_s` count; None
                for now.

        Raises:
            CacheNotFoundError: A reference without a text has no cache.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            CorruptCacheError: A cache is damaged, and there is no text to replace it.
            ContextWindowError: The caches, texts and conversation do not fit the model.
            ConfigError: The turns are invalid, see `encode_turns`.
            QueueFullError: More requests wait for the model than its queue admits.
        """
        start_s = time.perf_counter() if start_s is None else start_s
        self._generator.scheduler.check_room()
        backbone = self._compressor.backbone
        prompt = encode_turns(backbone, turns)
        documents = [token for text in texts for token in backbone.encode_document(text)]
        caches, so_far = self._load(references, so_far or Answer())
        if ranked:  # not before loading, whose errors name the best passage
            caches = place_ranked(caches, order=self._settings.order, rank_bias=self._settings.rank_bias)
        whole = Prompt([*documents, *prompt.ids], behind_prefix=True)
        return self._generator.reply(whole, caches, settings=settings, so_far=so_far, start_s=start_s)

    def reply_alone(self, turns: Sequence[Turn], *, settings: DecodeSettings | None = None) -> AnswerStream:
        """Reply to a conversation without documents, in the model's own chat template. Errors as in `reply`."""
        return self._generator.reply(encode_chat(self._compressor.backbone, turns), settings=settings)

    def complete(self, text: str, *, settings: DecodeSettings | None = None) -> AnswerStream:
        """Continue a text without any template. Errors as in `reply`."""
        return self._generator.reply(encode_text_prompt(self._compressor.backbone, text), settings=settings)

    def _load(self, references: Sequence[Reference], so_far: Answer) -> tuple[list[DistilledCache], Answer]:
        """The caches of the references; a missing or damaged cache is replaced by the full cache of its text."""
        caches: list[DistilledCache] = []
        damaged: list[str] = []
        n_text = 0  # tokens of texts that replace caches: they count as prompt, not as cached
        with span("load", collection=self._store.collection, n_references=len(references)):
            for reference in references:
                store = self._store
                if reference.collection not in (None, store.collection):
                    store = store.in_collection(str(reference.collection), create=False)
                keep = self._settings.keep if reference.keep_ratio is None else reference.keep_ratio
                text = reference.text
                try:
                    caches.append(store.get(reference.key, self._fingerprint, keep))
                    continue
                except CacheNotFoundError:
                    if text is None:
                        raise
                except CorruptCacheError as error:
                    text = store.text(reference.key) if text is None else text
                    if text is None:
                        raise CorruptCacheError(error.what, where=error.where, next_step=_ADD_AGAIN) from error
                    damaged.append(reference.key)
                    self._store_again(store, reference.key, text, keep)
                caches.append(self._compressor.compress(text, keep_ratio=1.0))
                n_text += caches[-1].n_tokens
        return caches, replace(
            so_far,
            n_prompt_tokens=n_text,
            n_cached_tokens=-n_text,
            keep_ratios=tuple(cache.keep_ratio for cache in caches),
            damaged=tuple(damaged),
        )

    def _store_again(self, store: Store, key: str, text: str, keep: float | Keep) -> None:
        """Replace a damaged cache, unless the text is another one: under this key, it would pass for the right one."""
        if key_of(text) == key:
            with contextlib.suppress(StoreError):  # the answer does not depend on storing it
                again = self._compressor.compress(text, keep_ratio=self._compressor.ratio_for(text, keep))
                store.put(key, again, storage=self._settings.storage)


def texts_of(hits: Sequence[Hit]) -> list[str]:
    """The texts of passages; a `TextNotKeptError` if one is not kept."""
    lacking = next((hit for hit in hits if hit.text is None), None)
    if lacking is not None:
        raise TextNotKeptError(
            "the text of a passage is not kept, so it can only be answered from its cache",
            where=f"{lacking.document_id}, passage {lacking.ordinal}",
            next_step="Add the document again with `--keep-text` (keep_text=True); it is not compressed again.",
        )
    return [hit.text for hit in hits if hit.text is not None]
