from __future__ import annotations

import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from llama_index.core.embeddings import MockEmbedding

from kv_memory.errors import ConfigError, EncoderError
from kv_memory.retrieval.encoder import Encoder, as_encoder
from tests.retrieval.concepts import Concepts


def three(texts: list[str]) -> list[list[float]]:
    return [[len(text), 1, 0] for text in texts]


@pytest.mark.parametrize(
    ("given", "name", "dim"),
    [
        (three, "three", 3),
        (("mine", three), "mine", 3),
        (Concepts(), "concepts", 5),
        (MockEmbedding(embed_dim=4, model_name="mock-4"), "mock-4", 4),
        (MockEmbedding(embed_dim=4), "MockEmbedding", 4),
        (DeterministicFakeEmbedding(size=6), "DeterministicFakeEmbedding", 6),
    ],
    ids=["function", "named", "encoder", "llama-index", "llama-index-unnamed", "langchain"],
)
def test_whatever_makes_vectors_becomes_an_encoder(given, name, dim):
    encoder = as_encoder(given)
    assert isinstance(encoder, Encoder)
    assert encoder.name == name
    vectors = encoder.embed(["a ferry", "b"])
    assert (vectors.shape, vectors.dtype) == ((2, dim), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.allclose(np.linalg.norm(encoder.embed_question("ferry")), 1)
    assert as_encoder(encoder) is encoder
    assert len(encoder.embed([])) == 0


def test_questions_are_embedded_as_the_model_embeds_them():
    class Asymmetric:
        model = "asymmetric"

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[1.0, 0.0]] * len(texts)

        def embed_query(self, text: str) -> list[float]:
            return [0.0, 2.0]

    encoder = as_encoder(Asymmetric())
    assert encoder.embed(["a"]).tolist() == [[1, 0]]
    assert encoder.embed_question("a").tolist() == [0, 1]


@pytest.mark.parametrize("given", [lambda texts: three(texts), 7, "", ("", three), ("x" * 256, three), ("a\nb", three)])
def test_what_is_no_encoder_is_refused(given):
    with pytest.raises(ConfigError, match="encoder"):
        as_encoder(given)


@pytest.mark.parametrize(
    "returned", [[], [[1.0]], [1.0, 2.0], [[1.0], [float("nan")]], [["a"], ["b"]], [[1.0], [1.0, 2.0]], [[], []], None]
)
def test_what_is_no_vector_is_refused(returned):
    with pytest.raises(EncoderError, match="odd"):
        as_encoder(("odd", lambda texts: returned)).embed(["a", "b"])


def test_a_failing_service_is_an_error_of_ours():
    def broken(texts: list[str]) -> list[list[float]]:
        raise ConnectionError("no route")

    with pytest.raises(EncoderError, match=r"no route.*broken.*nothing was stored"):
        as_encoder(broken).embed(["a"])


def test_a_vector_of_nothing_stays_nothing():
    assert as_encoder(("none", lambda texts: [[0.0, 0.0]])).embed(["a"]).tolist() == [[0, 0]]
