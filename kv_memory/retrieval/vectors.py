"""The vectors of a collection's passages, and their cosines with that of a question.

Vectors are stored beside their passages as float16: half the bytes, and the order of passages stays the same. They are
searched by one matrix product in memory, which takes 8 ms for 100,000 of 384 numbers on two cores. An index library was
rejected: it would save these milliseconds, find less, and need a file to be kept in step with the store.
"""

from __future__ import annotations

import threading

import numpy as np

from kv_memory.errors import EncoderError
from kv_memory.retrieval.bm25 import Row
from kv_memory.retrieval.encoder import Encoder
from kv_memory.store import Store

_STORED = np.dtype("<f2")


def to_bytes(vector: np.ndarray) -> bytes:
    """A vector (dim,) as it is stored."""
    return vector.astype(_STORED).tobytes()


class VectorIndex:
    """The vectors of the latest revision of one collection; thread-safe.

    Args:
        collection: Collection with the passages; other processes may add to it.
    """

    def __init__(self, collection: Store) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._loaded: tuple[int, list[Row], np.ndarray] | None = None  # of one revision
        self._encoder = ""

    def scores(self, question: str, encoder: Encoder) -> tuple[list[Row], np.ndarray]:
        """The passages, ordered by document id and ordinal, and their cosines with a question.

        Args:
            question: Any text.
            encoder: Encoder that the vectors came from.

        Returns:
            Passages of the latest revision, and cosines (n_passages,) float32.

        Raises:
            EncoderError: A passage has no vector, or one of another encoder.
        """
        rows, matrix = self._latest(encoder.name)
        if not rows:
            return rows, np.zeros(0, dtype=np.float32)
        vector = encoder.embed_question(question)
        if len(vector) != matrix.shape[1]:
            raise _unfit(f"its vectors have {len(vector)} numbers, the stored ones {matrix.shape[1]}", encoder.name)
        return rows, matrix @ vector

    def _latest(self, name: str) -> tuple[list[Row], np.ndarray]:
        revision = self._collection.revision
        with self._lock:
            if self._loaded is None or self._loaded[0] != revision or self._encoder != name:
                self._loaded = revision, *self._load(name)
                self._encoder = name
            return self._loaded[1], self._loaded[2]

    def _load(self, name: str) -> tuple[list[Row], np.ndarray]:
        stored = self._collection.vectors()
        others = [each for each in stored if each.encoder != name or each.vector is None]
        if others:
            one = others[0]
            of = f"has a vector of {one.encoder!r}" if one.vector is not None else "has no vector"
            raise _unfit(
                f"{len(others):,} of {len(stored):,} passages have no vector of this encoder; the first {of}",
                name,
                where=f"{one.document_id}, passage {one.ordinal}, ",
            )
        rows = [(each.document_id, each.ordinal, each.text_sha256) for each in stored]
        if not rows:
            return rows, np.zeros((0, 0), dtype=np.float32)
        sizes = {len(each.vector or b"") for each in stored}
        if len(sizes) > 1:
            raise _unfit("its vectors have different lengths", name)
        data = b"".join(each.vector or b"" for each in stored)
        return rows, np.frombuffer(data, dtype=_STORED).reshape(len(rows), -1).astype(np.float32)


def _unfit(what: str, encoder: str, *, where: str = "") -> EncoderError:
    return EncoderError(
        what,
        where=f"{where}encoder {encoder}",
        next_step=f"Run `kv-memory add --stale --encoder {encoder}` (KVMemory.refresh), which computes missing "
        "vectors from kept texts and unchanged files, and add other documents again; or retrieve with `bm25`.",
    )
