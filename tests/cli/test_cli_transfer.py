"""`kv-memory export`, `import` and `remove --purge`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.ran import Ran

Run = Callable[..., Ran]
ASK = ["ask", "When does the ferry to Skarholm leave?", "--max-new-tokens", "4", "--json"]


def test_an_exported_collection_answers_in_another_store(kv: Run, store: Path, tmp_path: Path) -> None:
    expected = kv(*ASK).json
    done = kv("export", "notes.tar", "--json")
    assert done.code == 0 and done.json["n_documents"] == 2 and done.json["path"] == str(tmp_path / "notes.tar")
    came = kv("import", "notes.tar", "--store", "laptop", "--json")
    assert came.code == 0 and (came.json["collection"], came.json["n_added"]) == ("default", 2)
    there = kv(*ASK, "--store", "laptop").json
    assert (there["text"], there["n_cached_tokens"]) == (expected["text"], expected["n_cached_tokens"])
    assert there["fallbacks"] == []


def test_export_and_import_print_a_summary(kv: Run, store: Path) -> None:
    assert kv("export", "notes.tar").out.startswith("Exported 2 documents and 2 caches of collection default: ")
    first = kv("import", "notes.tar", "--collection", "copy").out.splitlines()
    assert first[0].startswith("Imported into collection copy: 2 documents added, 0 replaced, 0 unchanged")
    assert first[1].startswith("2 new caches") and first[1].endswith("0 already present")
    assert "0 documents added, 0 replaced, 2 unchanged" in kv("import", "notes.tar", "--collection", "copy").out
    assert len(kv("list", "--collection", "copy", "--json").json["documents"]) == 2


def test_an_archive_is_not_written_to_a_pipe(kv: Run, store: Path, tmp_path: Path) -> None:
    refused = kv("export", "-", "--json")
    assert refused.code == 2 and refused.json["error"]["where"] == "FILE"
    assert not (tmp_path / "-").exists()


def test_a_damaged_or_missing_archive_creates_no_store(kv: Run, store: Path, tmp_path: Path) -> None:
    kv("export", "notes.tar")
    data = (tmp_path / "notes.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.tar").write_text("no archive")
    for name, what in (
        ("cut.tar", "incomplete"),
        ("text.tar", "not a kv-memory archive"),
        ("none.tar", "no such archive"),
    ):
        done = kv("import", name, "--store", "new", "--json")
        assert done.code == 1
        assert done.json["error"]["error"] == "TransferError" and what in done.json["error"]["what"]
        assert not (tmp_path / "new").exists()


def test_conflicts_are_refused_unless_on_conflict_is_given(kv: Run, store: Path) -> None:
    def content() -> str:
        return str(kv("list", "--json").json["documents"][0]["content_sha256"])

    kv("export", "notes.tar")
    theirs = content()
    kv("add", "-", "--id", "ferry", stdin="The ferry to Skarholm does not leave.")
    ours = content()
    refused = kv("import", "notes.tar", "--json")
    assert refused.code == 1 and "--on-conflict" in refused.json["error"]["next_step"]
    assert kv("import", "notes.tar", "--on-conflict", "skip", "--json").json["conflicts"] == ["ferry"]
    assert content() == ours != theirs
    assert kv("import", "notes.tar", "--on-conflict", "replace", "--json").json["n_replaced"] == 1
    assert content() == theirs
    wrong = kv("import", "notes.tar", "--on-conflict", "maybe", "--json")
    assert wrong.code == 2 and wrong.json["error"]["where"] == "--on-conflict"


def held(store: Path) -> bool:
    """Whether a file says that there was such a document, or has a part of its text."""
    data = [path.read_bytes().lower() for path in store.rglob("*") if path.is_file()]
    return any(word in file for file in data for word in (b"ferry", b"skarholm"))


def test_purge_leaves_no_trace_of_a_document(kv: Run, store: Path) -> None:
    kv(*ASK)
    assert held(store)
    done = kv("remove", "fer", "--purge", "--json")
    assert done.code == 0 and done.json["removed"] == ["ferry"] and done.json["purged"]["n_blobs"] == 1
    assert not held(store)
    assert kv("check").code == 0
    people = kv("remove", "light", "--purge").out
    assert people.startswith("Purged light\n") and "rewritten" in people


def test_purge_without_an_id_erases_removed_documents(kv: Run, store: Path) -> None:
    kv(*ASK)
    kv("remove", "ferry")
    assert held(store)
    assert kv("remove", "--purge", "--json").json["removed"] == []
    assert not held(store)
    nothing = kv("remove", "--json")
    assert nothing.code == 2 and nothing.json["error"]["where"] == "ID"


@pytest.mark.parametrize("args", [["export", "x.tar"], ["remove", "--purge"]])
def test_export_and_purge_without_a_store_say_how_to_create_one(kv: Run, args: list[str], tmp_path: Path) -> None:
    done = kv(*args, "--json")
    assert done.code == 1 and "kv-memory add" in done.json["error"]["next_step"]
    assert list(tmp_path.iterdir()) == []
