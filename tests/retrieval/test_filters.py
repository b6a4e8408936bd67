from __future__ import annotations

import math

import pytest

from kv_memory.errors import ConfigError, DocumentNotFoundError
from kv_memory.retrieval.filters import check_request, matching_documents

DOCUMENTS = {
    "a": {"year": 2025, "tags": ["sea", "ferry"], "draft": True},
    "b": {"year": 2026, "tags": ["ferry"], "draft": False},
    "c": {"year": "2026", "author": None},
    "d": {},
}
RIGHT = {"top_k": 1, "document_ids": None, "filter": None, "min_score": None}


@pytest.mark.parametrize(
    ("ids", "filter", "found"),
    [
        (None, None, "abcd"),
        (["a", "d"], None, "ad"),
        ([], None, ""),
        (None, {}, "abcd"),
        (None, {"year": 2026}, "b"),
        (None, {"year": "2026"}, "c"),
        (None, {"year": [2026, "2026"]}, "bc"),
        (None, {"year": []}, ""),
        (None, {"tags": "ferry"}, "ab"),
        (None, {"tags": ["sea", "air"]}, "a"),
        (None, {"tags": "ferry", "year": 2026}, "b"),
        (None, {"draft": True}, "a"),
        (None, {"draft": 1}, ""),
        (None, {"author": None}, "c"),
        (["a", "c"], {"year": [2025, 2026]}, "a"),
    ],
)
def test_documents_are_found_by_id_and_metadata(ids, filter, found):
    assert matching_documents(DOCUMENTS, ids, filter) == set(found)


def test_an_unknown_id_is_an_error():
    with pytest.raises(DocumentNotFoundError, match="'x'"):
        matching_documents(DOCUMENTS, ["a", "x"], None)


def test_unknown_metadata_are_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'year'"):
        matching_documents(DOCUMENTS, None, {"yeer": 1})
    with pytest.raises(ConfigError, match="No document of the collection has any"):
        matching_documents({"a": {}}, None, {"year": 1})
    assert matching_documents({}, None, {"year": 1}) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"document_ids": "a"},
        {"document_ids": [1]},
        {"document_ids": 7},
        {"filter": ["year"]},
        {"filter": {1: "a"}},
        {"filter": {"year": {"from": 2020}}},
        {"filter": {"year": [[2020]]}},
        {"min_score": math.nan},
        {"min_score": True},
        {"min_score": "1"},
    ],
)
def test_malformed_arguments_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        check_request(**{**RIGHT, **wrong})


def test_well_formed_arguments_pass():
    check_request(**{**RIGHT, "document_ids": {"a"}, "filter": {"year": (1, 2.5, None, True)}, "min_score": 0})
