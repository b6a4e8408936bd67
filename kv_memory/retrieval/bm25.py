"""BM25 retrieval of the passages that a question is about, with an index kept on disk between runs.

The index is one file, `bm25.index`: a line with the SHA-256 of the rest, then safetensors. The format of bm25s, a
folder of five files, was rejected: no rename replaces a folder that is not empty, while a file is replaced atomically,
even with several writers. Neither format contains pickle. Texts stay in the store and are looked up.

Passages without kept text come as `Terms`: their words hashed under a key. If there are any, all words of the index are
hashes under that key. That changes no score: BM25 only asks which words are equal. In merged collections, passages are
hashed under several keys, and a word has one hash per key; its rarity is corrected when a question contains it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kv_memory.config import check_choice
from kv_memory.errors import ConfigError, DocumentNotFoundError
from kv_memory.retrieval.hashed_terms import Terms, hash_word
from kv_memory.retrieval.tokenize import Language, question_words, words_of

__all__ = ["BM25Index", "Collection", "CollectionIndex", "Hit", "Passage"]

_FORMAT = 2  # version of the file format and of the tokenization; a change of either rebuilds every index
_FILE_NAME = "bm25.index"
_ARRAYS = ("data", "indices", "indptr")  # sparse matrix of scores, word by word
_STALE_S = 3600
_log = logging.getLogger(__name__)


class Passage(Protocol):
    """The unit of the index: one passage of a document, as stored."""

    @property
    def document_id(self) -> str:
        """Id of the document that contains the passage."""

    @property
    def ordinal(self) -> int:
        """Position in the document, from 0."""

    @property
    def text(self) -> str | None:
        """Text of the passage; None if it is not kept."""

    @property
    def terms(self) -> Terms | None:
        """Hashed words of the passage, if its text is not kept."""

    @property
    def text_sha256(self) -> str:
        """SHA-256 of the text, in hex: the key of its distilled cache."""

    @property
    def n_tokens(self) -> int:
        """Length of the passage in tokens."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the document."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage found for a question.

    Attributes:
        document_id: Id of the document that contains the passage.
        ordinal: Position of the passage in the document, from 0.
        score: Score, the higher the better; comparable within one question only.
        text: Text of the passage; None if it is not kept.
        text_sha256: SHA-256 of the text, in hex.
        metadata: Metadata of the document.
    """

    document_id: str
    ordinal: int
    score: float
    text: str | None
    text_sha256: str
    metadata: Mapping[str, Any]


class Collection(Protocol):
    """The searched passages: those of one collection, with a revision that grows with each change."""

    @property
    def revision(self) -> int:
        """Number of the latest change."""

    @property
    def index_folder(self) -> Path:
        """Folder of the index."""

    def passages(self) -> Sequence[Passage]:
        """All passages."""

    def passage(self, document_id: str, ordinal: int, /) -> Passage:
        """One passage; raises `DocumentNotFoundError` if it does not exist."""


class BM25Index:
    """BM25 over the passages of one collection; created with `open`, and thread-safe."""

    def __init__(
        self,
        scorer: Any,
        rows: Sequence[tuple[str, int, str]],
        keys: Sequence[str],
        *,
        lookup: Callable[[str, int], Passage],
        language: Language | None,
    ) -> None:
        self._scorer = scorer  # a bm25s.BM25, or None if no passage contains a word
        self._rows = rows
        self._keys = keys  # hash keys of the words, the most frequent first; empty if all texts are kept
        self._lookup = lookup
        self._language = language

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        revision: int,
        passages: Callable[[], Sequence[Passage]],
        lookup: Callable[[str, int], Passage],
        language: Language | None = None,
    ) -> BM25Index:
        """Load the index of a collection, or build and save it.

        A missing, outdated or damaged file is rebuilt. If the file cannot be written, a warning is logged; the index
        still works, and is rebuilt next time.

        Args:
            folder: Folder of this collection's index; created if missing.
            revision: Revision of the collection's passages: a number that changes whenever they do.
            passages: Function that returns all passages; called only to build the index.
            lookup: Function from document id and ordinal to the passage, called for hits. It may raise
                `DocumentNotFoundError`.
            language: `en` for English stems and stop words; None for any language.

        Raises:
            ConfigError: `language` is unknown, or is given although a passage has no text: hashes have no stems.
        """
        if language is not None:
            check_choice(language, Language, where="language")
        header = {"format": _FORMAT, "revision": revision, "language": language}
        path = Path(folder) / _FILE_NAME
        loaded = _read(path, header)
        if loaded is None:
            loaded = _build(passages(), language)
            _write(path, header, *loaded)
        return cls(*loaded, lookup=lookup, language=language)

    def __len__(self) -> int:
        return len(self._rows)

    def retrieve(self, question: str, *, top_k: int) -> list[Hit]:
        """Retrieve the passages that share words with the question, best first.

        A passage that was removed or changed since the index was built is skipped.

        Args:
            question: Any text.
            top_k: Maximum number of passages; it may exceed the number of passages in the index.

        Returns:
            Hits with a score above 0; hits with equal scores are in the order of document id and ordinal.

        Raises:
            ConfigError: `top_k` is below 1.
        """
        if top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}", where="top_k")
        if self._scorer is None:
            return []
        scores = self._scores(question_words(question, language=self._language))
        found = np.flatnonzero(scores > 0)
        # Not the top-k of bm25s, which breaks ties at random. Rows are in the order for ties, and the sort is stable.
        hits: list[Hit] = []
        for row in found[np.argsort(-scores[found], kind="stable")]:
            document_id, ordinal, text_sha256 = self._rows[row]
            try:
                passage = self._lookup(document_id, ordinal)
            except DocumentNotFoundError:
                continue
            if passage.text_sha256 != text_sha256:
                continue
            hits.append(
                Hit(
                    document_id=document_id,
                    ordinal=ordinal,
                    score=float(scores[row]),
                    text=passage.text,
                    text_sha256=text_sha256,
                    metadata=passage.metadata,
                )
            )
            if len(hits) == top_k:
                break
        return hits

    def _scores(self, words: Sequence[str]) -> Any:
        """Scores of all rows, `(n_rows,)`."""
        scorer = self._scorer
        if len(self._keys) < 2:
            tokens = [hash_word(word, key) for word in words for key in self._keys] if self._keys else words
            return scorer.get_scores_from_ids(scorer.get_tokens_ids(tokens))
        data, indices, indptr = (scorer.scores[name] for name in _ARRAYS)
        scores = np.zeros(len(self._rows), dtype=data.dtype)
        for word in words:
            ids = scorer.get_tokens_ids([hash_word(word, key) for key in self._keys])
            found = [slice(int(indptr[id_]), int(indptr[id_ + 1])) for id_ in ids]
            counts = [part.stop - part.start for part in found]  # passages with the word, per key
            for part, count in zip(found, counts, strict=True):
                # Scores contain the word's rarity under one key as a factor; replace it by the rarity under all keys.
                scores[indices[part]] += data[part] * (self._rarity(sum(counts)) / self._rarity(count))
        return scores

    def _rarity(self, n_passages: int) -> float:
        """Inverse document frequency by Lucene's formula, the default of bm25s."""
        return math.log(1 + (len(self._rows) - n_passages + 0.5) / (n_passages + 0.5))


_Rows = list[tuple[str, int, str]]


def _build(passages: Sequence[Passage], language: Language | None) -> tuple[Any, _Rows, list[str]]:
    ordered = sorted(passages, key=lambda passage: (passage.document_id, passage.ordinal))
    if language is not None and any(passage.text is None for passage in ordered):
        raise ConfigError(
            "searching with a language needs the texts of all passages, and some are not kept",
            where="language",
            next_step="Leave the language out, or add the documents again with their texts (`--keep-text`).",
        )
    frequent = Counter(passage.terms.key for passage in ordered if passage.text is None and passage.terms is not None)
    keys = sorted(frequent, key=lambda key: (-frequent[key], key))
    hashed = cache(partial(hash_word, key=keys[0])) if keys else None
    vocabulary: dict[str, int] = {}

    def ids_of(passage: Passage) -> list[int]:
        tokens: Iterable[str] = passage.terms or ()
        if passage.text is not None:
            words = words_of(passage.text, language=language)
            tokens = words if hashed is None else map(hashed, words)
        # Not the word ids of bm25s, which follow the order of a set and differ from run to run.
        return [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]

    ids = [ids_of(passage) for passage in ordered]
    rows = [(p.document_id, p.ordinal, p.text_sha256) for p in ordered]
    if not vocabulary:  # bm25s would divide by a mean length of 0
        return None, rows, keys
    # Not BM25.index, which sets its logger to DEBUG and logs, regardless of the application's level.
    scores = bm25s.BM25().build_index_from_ids(list(vocabulary.values()), ids, show_progress=False)
    return _scorer(vocabulary, scores), rows, keys


def _scorer(vocabulary: dict[str, int], scores: dict[str, Any]) -> Any:
    scorer = bm25s.BM25()
    scorer.vocab_dict, scorer.scores, scorer.nonoccurrence_array = vocabulary, scores, None
    return scorer


def _write(path: Path, header: Mapping[str, Any], scorer: Any, rows: _Rows, keys: list[str]) -> None:
    """Replace the file atomically: a crash leaves the old file, or a temporary file that nothing reads."""
    text = {"header": header, "rows": rows, "keys": keys, "words": list(scorer.vocab_dict) if scorer else []}
    arrays = {"text": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8)}
    if scorer:
        arrays |= {name: np.ascontiguousarray(scorer.scores[name]) for name in _ARRAYS}
    body = save(arrays)
    try:
        for folder in (path.parent.parent, path.parent):  # private, like the texts that contain the words
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in path.parent.glob(f"{_FILE_NAME}*.tmp"):  # left by crashes; a new one may be in use elsewhere
            if time.time() - left.stat().st_mtime > _STALE_S:
                left.unlink(missing_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=_FILE_NAME, suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        # The folder is not synced: after a power cut, an old file is simply rebuilt.
    except OSError as error:
        _log.warning("the BM25 index cannot be saved and will be rebuilt next time: %s", error)


def _read(path: Path, header: Mapping[str, Any]) -> tuple[Any, _Rows, list[str]] | None:
    """Load the index; None if the file is missing or damaged, or has another header."""
    try:
        # Not memory-mapped: the file is hashed anyway, and Windows cannot replace a mapped file.
        digest, _, body = path.read_bytes().partition(b"\n")
        if digest != hashlib.sha256(body).hexdigest().encode():
            _log.warning("the BM25 index is damaged and will be rebuilt: %s", path)
            return None
        arrays = load(body)
        text = json.loads(arrays["text"].tobytes())
        if text["header"] != header:
            return None
        rows: _Rows = [(document_id, ordinal, sha256) for document_id, ordinal, sha256 in text["rows"]]
        keys: list[str] = list(text["keys"])
        if not text["words"]:
            return None, rows, keys
        scores = {name: arrays[name] for name in _ARRAYS} | {"num_docs": len(rows)}
        return _scorer({word: i for i, word in enumerate(text["words"])}, scores), rows, keys
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        _log.warning("the BM25 index cannot be read and will be rebuilt: %s", error)
        return None


class CollectionIndex:
    """BM25 over the latest revision of one collection; thread-safe.

    Args:
        collection: Collection with the passages; other processes may add to it.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._index: tuple[int, BM25Index] | None = None

    def retrieve(self, question: str, *, top_k: int) -> list[Hit]:
        """Retrieve at most `top_k` passages, best first; errors as in `BM25Index.retrieve`."""
        collection, revision = self._collection, self._collection.revision
        with self._lock:
            if self._index is None or self._index[0] != revision:
                index = BM25Index.open(
                    collection.index_folder,
                    revision=revision,
                    passages=collection.passages,
                    lookup=collection.passage,
                )
                self._index = (revision, index)
            index = self._index[1]
        return index.retrieve(question, top_k=top_k)
