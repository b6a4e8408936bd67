"""A small store of documents about small things, for the tests of the facade."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_memory import DecodeSettings, KVMemory, errors
from tests.conftest import make_backbone
from tests.reference import recorded_inputs

SETTINGS = DecodeSettings(max_new_tokens=4)
FERRY = "The ferry to Skarholm leaves at 7.40 from pier 4 every morning."
LAMP = "The lighthouse lamp burned whale oil until an office acted."
LONG = " ".join(f"Paragraph {i} tells of the {word} and nothing else." for i, word in enumerate(
    ["walrus", "kettle", "violin", "comet", "turnip", "anvil", "glacier", "parsnip"]
))  # fmt: skip
FERRY_QUESTION = "When does the ferry leave?"
LAMP_QUESTION = "What did the lamp burn?"


def wide_backbone(name: str = "llama", **changes: Any) -> Any:
    """A tiny model with room for several passages."""
    return make_backbone(name, max_position_embeddings=4096, **changes)


def open_memory(path: Path, backbone: Any, **options: Any) -> KVMemory:
    """A store in the folder, with passages of 64 tokens; the selector asks one forward pass a passage."""
    return KVMemory.open(
        path, model=backbone, **{"selector": "attention", "keep_ratio": 0.25, "passage_tokens": 64, **options}
    )


def answerable(memory: KVMemory, *questions: str) -> list[str]:
    """The answers, each from a stored cache."""
    answers = [memory.ask(question, top_k=1, settings=SETTINGS) for question in questions]
    assert all(answer.sources and not answer.fallbacks and answer.n_cached_tokens > 11 for answer in answers)
    return [answer.sources[0].document_id for answer in answers]


def blob_files(memory: KVMemory) -> list[Path]:
    return sorted((memory.path / "blobs").rglob("*.val"))


def cache_blobs(memory: KVMemory) -> int:
    """How many files hold caches: one more holds the shared prefix."""
    return len(blob_files(memory)) - 1


def blob_of(memory: KVMemory, document_id: str) -> Path:
    """The file of a document's only cache."""
    (info,) = memory.store.caches(document_id)
    return next(p for p in blob_files(memory) if hashlib.sha256(p.read_bytes()).hexdigest() == info.blob_key)


def assert_says(error: BaseException, kind: type[errors.KVMemoryError], *, what: str, where: str, step: str) -> None:
    assert type(error) is kind
    assert re.search(what, error.what), error.what
    assert where in (error.where or ""), error.where
    assert error.next_step is not None and re.search(step, error.next_step), error.next_step
    # All three reach who only sees the message.
    assert error.what in str(error) and (error.where or "") in str(error) and error.next_step in str(error)


@contextmanager
def untouched(memory: KVMemory) -> Iterator[None]:
    """Nothing of what was there changes, nothing is read by the model, and all of it can be asked about."""
    before = memory.documents(), memory.store.caches(), memory.store.settings()
    with recorded_inputs(memory.backbone) as inputs:
        yield
    assert inputs == []
    assert (memory.documents(), memory.store.caches(), memory.store.settings()) == before
    assert memory.check().ok
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
