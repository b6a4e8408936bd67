"""Sources that are files: what they list, one document read again by its uri, and what is said where that fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import ConfigError, KVMemoryError, UnreadableDocumentError
from kv_memory.jobs.job_records import SourceItem
from kv_memory.jobs.sources.files import path_of
from kv_memory.jobs.sources.source import ReadItem, uri_of
from tests.jobs.source_samples import read_all, sources_of, texts

# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("a.txt", "b.md", "deep/er/c.md", "deep/d.csv", ".hidden.txt", ".git/e.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"This is {name}.")
    return root


def names(found: dict[str, ReadItem], root: Path) -> list[str]:
    return sorted(os.path.relpath(id_, root.resolve()) for id_ in found)


def test_folder_source_lists_files_recursively(tree: Path) -> None:
    found = read_all(sources_of(tree))
    assert names(found, tree) == ["a.txt", "b.md", "deep/er/c.md"]
    assert all(read.document.id == id_ and not read.whole for id_, read in found.items())
    (item, *_) = (i for i in sources_of(tree).items() if i.document_id.endswith("a.txt"))
    assert item.size_bytes == len("This is a.txt.")


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.md", ["b.md", "deep/er/c.md"]),
        ("*.csv", ["deep/d.csv"]),
        ("deep/*.csv", ["deep/d.csv"]),
        ("**/*.md", ["b.md", "deep/er/c.md"]),
        ("deep/**/*.md", ["deep/er/c.md"]),
        ("?.txt", ["a.txt"]),
        ("nothing*", []),
    ],
)
def test_glob_selects_files_of_a_folder(tree: Path, glob: str, expected: list[str]) -> None:
    assert names(read_all(sources_of(tree, glob=glob)), tree) == expected


def test_single_file_and_pattern_as_sources(tree: Path) -> None:
    assert names(read_all(sources_of(tree / "deep/d.csv")), tree) == ["deep/d.csv"]
    assert names(read_all(sources_of(f"{tree}/**/*.md")), tree) == ["b.md", "deep/er/c.md"]


@pytest.mark.parametrize(
    "name", ["sp ace.txt", "ha#sh.txt", "per%20cent.txt", "ümläut.txt", "quest?.txt", "br[ack]et.txt"]
)
def test_file_names_with_special_uri_characters(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("Here.")
    assert texts(read_all(sources_of(tmp_path))) == {str(tmp_path.resolve() / name): "Here."}
    assert path_of(uri_of(tmp_path / name)) == tmp_path / name


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"b\xffd.txt")).write_text("Here.")
    ((id_, text),) = texts(read_all(sources_of(tmp_path))).items()
    assert text == "Here." and id_.endswith(r"b\xffd.txt")


def test_links_to_files_and_folders(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("Outside.")
    (tree / "link.md").symlink_to(tmp_path / "outside.txt")
    (tree / "round").symlink_to(tree, target_is_directory=True)
    (tree / "broken.txt").symlink_to(tree / "nothing")
    items = {item.uri.rpartition("/")[2]: item for item in sources_of(tree).items()}
    assert sorted(items) == ["a.txt", "b.md", "broken.txt", "c.md", "link.md"]
    assert items["link.md"].document_id == str((tmp_path / "outside.txt").resolve())
    assert items["broken.txt"].error is not None and "no such file or folder" in str(items["broken.txt"].error["what"])


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may read everything")
def test_folder_that_cannot_be_listed_is_one_failed_item(tree: Path) -> None:
    (tree / "deep").chmod(0)
    items = list(sources_of(tree).items())
    (tree / "deep").chmod(0o755)
    (failed,) = (item for item in items if item.error)
    assert failed.document_id.endswith("deep") and len(items) == 3


# -- what is named -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "options", "kind", "said"),
    [
        ("nothing.txt", {}, UnreadableDocumentError, "no such file"),
        ("*.jsonl", {}, UnreadableDocumentError, "no file matches"),
        ("hub:", {}, ConfigError, "OWNER/NAME"),
        ("hub:a:b:c:d", {}, ConfigError, "OWNER/NAME"),
        ("sql:sqlite:///x.db", {}, ConfigError, "needs a query"),
        ("sql:not a url", {"query": "SELECT 1"}, ConfigError, "not a database URL"),
        (".", {"query": "SELECT 1"}, ConfigError, "--query needs a source"),
        ("a.txt", {"glob": "*.md"}, ConfigError, "--glob needs a folder"),
    ],
)
def test_invalid_sources_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
    options: dict[str, Any],
    kind: type[KVMemoryError],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A")
    with pytest.raises(kind, match=said):
        sources_of(named, **options)


def test_broken_source_does_not_block_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    (tmp_path / "b.txt").write_text("B")
    bad, good = sources_of(tmp_path / "a.parquet", tmp_path / "b.txt").items()
    assert bad.error is not None and good.error is None


def test_uri_of_another_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not in any source of the job"):
        sources_of(tmp_path).read(SourceItem(document_id="x", uri="hub:x#1"))
