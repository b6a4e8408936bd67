"""Encoders: from texts to vectors, by which passages are compared with a question beside BM25.

Any embedding model of LlamaIndex or LangChain, or a function, becomes one; none of these packages is imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from kv_memory.config import check_name
from kv_memory.errors import ConfigError, EncoderError, KVMemoryError

MINILM = "minilm"  # the built-in encoder, see `kv_memory.retrieval.minilm`
_LONGEST_NAME = 255


@runtime_checkable
class Encoder(Protocol):
    """A model that makes vectors of texts; similar texts have vectors with a large cosine."""

    @property
    def name(self) -> str:
        """Name of the model, recorded with each vector: vectors of two models cannot be compared."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of passages: (n, dim) float32, each of length 1."""

    def embed_question(self, question: str) -> np.ndarray:
        """The vector of a question: (dim,) float32 of length 1. Some models embed questions otherwise than passages."""


# `name` and a function, or an object of a framework.
EncoderLike: TypeAlias = Encoder | tuple[str, Callable[[list[str]], Any]] | Callable[[list[str]], Any] | Any


@dataclass(frozen=True)
class _Wrapped:
    """Somebody's functions as an encoder: what they return is checked and normalised, what they raise is mapped.

    Attributes:
        name: Name of the model.
        passages: Function from a list of texts to their vectors.
        question: Function from a question to its vector.
    """

    name: str
    passages: Callable[[list[str]], Any]
    question: Callable[[str], Any]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.embed`."""
        return self._checked(lambda: self.passages(list(texts)), len(texts)) if texts else np.zeros((0, 0), np.float32)

    def embed_question(self, question: str) -> np.ndarray:
        """See `Encoder.embed_question`."""
        vector: np.ndarray = self._checked(lambda: [self.question(question)], 1)[0]
        return vector

    def _checked(self, call: Callable[[], Any], n: int) -> np.ndarray:
        try:
            vectors = np.asarray(call(), dtype=np.float32)
        except KVMemoryError:
            raise
        except Exception as error:  # of any embedding service
            raise EncoderError(
                f"the encoder failed: {error or type(error).__name__}",
                where=self.name,
                next_step="Check the service or model behind it, then try again; nothing was stored.",
            ) from error
        if vectors.ndim != 2 or len(vectors) != n or not vectors.size or not np.isfinite(vectors).all():
            raise EncoderError(
                f"the encoder must return {n} vectors of finite numbers, got an array of shape {vectors.shape}",
                where=self.name,
                next_step="Return one list of numbers for each text.",
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        normalised: np.ndarray = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return normalised


def as_encoder(given: EncoderLike) -> Encoder:
    """The encoder in whatever a caller has.

    Args:
        given: An `Encoder`; a LlamaIndex embedding (`BaseEmbedding`); a LangChain one (`Embeddings`); a function from a
            list of texts to their vectors, or `(name, function)`.

    Raises:
        ConfigError: It is something else, or has no name.
    """
    if isinstance(given, _Wrapped):
        return given
    if isinstance(given, tuple) and len(given) == 2 and callable(given[1]):
        name, passages = given
        question = functools.partial(_first, passages)
    elif hasattr(given, "get_text_embedding_batch") and hasattr(given, "get_query_embedding"):
        name, passages, question = _name(given), given.get_text_embedding_batch, given.get_query_embedding
    elif hasattr(given, "embed_documents") and hasattr(given, "embed_query"):
        name, passages, question = _name(given), given.embed_documents, given.embed_query
    elif hasattr(given, "embed") and hasattr(given, "name"):
        name, passages = given.name, given.embed
        question = getattr(given, "embed_question", functools.partial(_first, passages))
    elif callable(given):
        name, passages = getattr(given, "__name__", type(given).__name__), given
        question = functools.partial(_first, passages)
    else:
        raise ConfigError(
            f"not an encoder: {type(given).__name__}",
            where="encoder",
            next_step="Pass 'minilm', an embedding of LlamaIndex or LangChain, or (name, function).",
        )
    if name == "<lambda>":
        raise ConfigError("the encoder has no name", where="encoder", next_step="Pass (name, function).")
    check_name(name, where="encoder", most=_LONGEST_NAME)
    return _Wrapped(name, passages, question)


def _first(passages: Callable[[list[str]], Any], question: str) -> Any:
    return passages([question])[0]


def _name(given: Any) -> str:
    """The name of a framework's model, or of its class."""
    names = (getattr(given, attribute, None) for attribute in ("model_name", "model"))
    return next((name for name in names if isinstance(name, str) and name not in {"", "unknown"}), type(given).__name__)
