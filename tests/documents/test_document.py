from __future__ import annotations

import hashlib
import math
from dataclasses import FrozenInstanceError, replace

import pytest

from kv_memory.documents import Document
from kv_memory.errors import ConfigError, EmptyDocumentError, UnreadableDocumentError


def test_hash_covers_the_exact_text():
    document = Document(id="a", text="Grüße\r\n")
    assert document.content_sha256 == hashlib.sha256("Grüße\r\n".encode()).hexdigest()
    assert replace(document, text="Grüße\n").content_sha256 != document.content_sha256


def test_is_frozen_and_hashable_and_keeps_a_copy_of_its_metadata():
    metadata = {"tags": ("a", "b"), "page": 1}
    document = Document(id="a", text="x", metadata=metadata)
    metadata["page"] = 2
    assert document.metadata == {"tags": ["a", "b"], "page": 1}
    assert len({document, Document(id="a", text="x")}) == 2
    with pytest.raises(FrozenInstanceError):
        document.text = "y"


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003\n"])
def test_blank_text_is_refused(text):
    with pytest.raises(EmptyDocumentError) as caught:
        Document(id="a", text=text)
    assert caught.value.where == "a"


def test_nul_is_refused():
    with pytest.raises(UnreadableDocumentError, match="offset 2"):
        Document(id="a", text="ab\0c")


def test_unpaired_surrogate_is_refused():
    with pytest.raises(UnreadableDocumentError, match="character 1"):
        Document(id="a", text="a\ud800")


@pytest.mark.parametrize("id_", ["", "  ", "a\0b", "a\nb", "\ud800", None, 7])
def test_invalid_ids_are_refused(id_):
    with pytest.raises(ConfigError, match="id"):
        Document(id=id_, text="x")


@pytest.mark.parametrize("id_", ["a b", "日本\u3000語", "résumé.md", "/data/x.md"])
def test_any_printable_id_is_accepted(id_):
    assert Document(id=id_, text="x").id == id_


@pytest.mark.parametrize("metadata", [{"a": object()}, {"a": math.nan}, {1: "a"}, {"a": "\ud800"}, ["a"], None, "a"])
def test_metadata_that_json_cannot_represent_are_refused(metadata):
    with pytest.raises(ConfigError, match="metadata") as caught:
        Document(id="a", text="x", metadata=metadata)
    assert caught.value.where == "a"


def test_text_must_be_a_string():
    with pytest.raises(ConfigError, match="bytes"):
        Document(id="a", text=b"x")
