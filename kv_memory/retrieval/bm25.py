"""BM25 scores of passages for a question, with an index kept on disk between runs.

The index is one file, `bm25.index`: a line with the SHA-256 of the rest, then safetensors. The format of bm25s, a
folder of five files, was rejected: no rename replaces a folder that is not empty, while a file is replaced atomically,
even with several writers. Neither format contains pickle. Texts stay in the store and are looked up.

The words of the index are hashes, whether or not the store keeps texts: BM25 only asks which words are equal. They are
those of a passage, of the headings above it, and of its document's title: a passage rarely repeats what it is about.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import bm25s
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kv_memory.retrieval.hashed_terms import terms_of, terms_of_question
from kv_memory.store import Store
from kv_memory.store.fs import private_folder
from kv_memory.store.records import StoredPassage

_FORMAT = 5  # version of the file format and of the tokenization; a change of either rebuilds every index
_FILE_NAME = "bm25.index"
_ARRAYS = ("data", "indices", "indptr")  # sparse matrix of scores, word by word
_STALE_S = 3600
_log = logging.getLogger(__name__)


Row: TypeAlias = tuple[str, int, str]  # document id, ordinal and text_sha256 of a passage


class _Index(NamedTuple):
    header: dict[str, int]
    rows: list[Row]
    languages: list[str]  # of the passages, the most frequent first; empty for one without stems
    scorer: Any  # a bm25s.BM25, or None if no passage contains a word


class CollectionIndex:
    """BM25 over the latest revision of one collection; thread-safe.

    The index is loaded, or built and saved, when a question finds it missing, outdated or damaged. If the file cannot
    be written, a warning is logged; the index still works, and is rebuilt next time.

    Args:
        collection: Collection with the passages; other processes may add to it.
    """

    def __init__(self, collection: Store) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._index = _Index({}, [], [], None)

    def scores(self, question: str) -> tuple[list[Row], np.ndarray]:
        """The passages, ordered by document id and ordinal, and their scores for a question.

        Args:
            question: Any text.

        Returns:
            Passages of the latest revision, and scores (n_passages,) float32: 0 without a shared word.
        """
        _, rows, languages, scorer = self._latest()
        ids = [] if scorer is None else scorer.get_tokens_ids(terms_of_question(question, languages))
        return rows, scorer.get_scores_from_ids(ids) if ids else np.zeros(len(rows), dtype=np.float32)

    def _latest(self) -> _Index:
        header = {"format": _FORMAT, "revision": self._collection.revision}
        with self._lock:
            if self._index.header != header:
                path = self._collection.index_folder / _FILE_NAME
                index = _read(path, header)
                if index is None:
                    index = _build(self._collection.passages(), header)
                    _write(path, index)
                self._index = index
            return self._index


def _build(passages: Sequence[StoredPassage], header: dict[str, int]) -> _Index:
    ordered = sorted(passages, key=lambda passage: (passage.document_id, passage.ordinal))
    rows = [(p.document_id, p.ordinal, p.text_sha256) for p in ordered]
    # Not the word ids of bm25s, which follow the order of a set and differ from run to run.
    vocabulary: dict[str, int] = {}
    ids: list[list[int]] = []
    for passage in ordered:
        # Without its text, the headings are among the terms.
        above = [str(passage.metadata.get("title") or "")]
        text = "\n".join(above if passage.text is None else [*above, passage.headings, passage.text])
        terms = Counter(passage.terms or {} if passage.text is None else {})
        terms += Counter(terms_of(text, passage.language))
        ids.append([id_ for term, n in terms.items() for id_ in [vocabulary.setdefault(term, len(vocabulary))] * n])
    languages = [language for language, _ in Counter(passage.language for passage in ordered).most_common()]
    if not vocabulary:  # bm25s would divide by a mean length of 0
        return _Index(header, rows, languages, None)
    # Not BM25.index, which sets its logger to DEBUG and logs, regardless of the application's level.
    scores = bm25s.BM25().build_index_from_ids(list(vocabulary.values()), ids, show_progress=False)
    return _Index(header, rows, languages, _scorer(vocabulary, scores))


def _scorer(vocabulary: dict[str, int], scores: dict[str, Any]) -> Any:
    scorer = bm25s.BM25()
    scorer.vocab_dict, scorer.scores, scorer.nonoccurrence_array = vocabulary, scores, None
    return scorer


def _write(path: Path, index: _Index) -> None:
    """Replace the file atomically: a crash leaves the old file, or a temporary file that nothing reads."""
    scorer = index.scorer
    words = list(scorer.vocab_dict) if scorer else []
    text = {"header": index.header, "rows": index.rows, "languages": index.languages, "words": words}
    arrays = {"text": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8)}
    if scorer:
        arrays |= {name: np.ascontiguousarray(scorer.scores[name]) for name in _ARRAYS}
    body = save(arrays)
    try:
        private_folder(path.parent)
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


def _read(path: Path, header: dict[str, int]) -> _Index | None:
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
        rows = [(document_id, ordinal, text_sha256) for document_id, ordinal, text_sha256 in text["rows"]]
        if not text["words"]:
            return _Index(header, rows, text["languages"], None)
        scores = {name: arrays[name] for name in _ARRAYS} | {"num_docs": len(rows)}
        return _Index(
            header, rows, text["languages"], _scorer({word: i for i, word in enumerate(text["words"])}, scores)
        )
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        _log.warning("the BM25 index cannot be read and will be rebuilt: %s", error)
        return None
