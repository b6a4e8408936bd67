from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kv_memory.documents import Document, read_documents, read_file
from kv_memory.documents.loaders import MAX_LINE_BYTES
from kv_memory.errors import ConfigError, DocumentError, EmptyDocumentError, UnreadableDocumentError

LONG_LINE = "x" * (MAX_LINE_BYTES + 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "sub" / ".hidden").mkdir(parents=True)
    (root / "b.md").write_text("# B")
    (root / "a.txt").write_text("A")
    (root / "sub" / "c.rst").write_text("C")
    (root / "sub" / "image.png").write_bytes(b"\x89PNG")
    (root / ".secret.txt").write_text("S")
    (root / "sub" / ".hidden" / "d.txt").write_text("D")
    return root


def names(result) -> list[str]:
    return [document.metadata["file_name"] for document in result.documents]


# What may be handed in


def test_a_string_is_text_even_if_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("content")
    (document,) = read_documents("a.txt").documents
    assert document.text == "a.txt"
    assert document.id == "text-" + hashlib.sha256(b"a.txt").hexdigest()[:12]


def test_mixed_sources_are_read_in_order(folder):
    given = Document(id="doc", text="Given")
    result = read_documents(["Text", folder / "b.md", given, ("pair", "P"), ("triple", "T", {"k": 1})])
    assert [d.text for d in result.documents] == ["Text", "# B", "Given", "P", "T"]
    assert result.documents[2] is given
    assert result.documents[4].metadata == {"k": 1}
    assert (result.errors, result.skipped) == ((), ())


@pytest.mark.parametrize("wrap", [iter, tuple, set, lambda items: (item for item in items)])
def test_any_iterable_of_documents_is_accepted(wrap):
    paths = [Document(id="a", text="A"), Document(id="b", text="B")]
    assert {d.id for d in read_documents(wrap(paths)).documents} == {"a", "b"}


def test_single_pair_is_one_document():
    (document,) = read_documents(("id", "text")).documents
    assert (document.id, document.text) == ("id", "text")


def test_empty_source_gives_no_documents():
    assert read_documents([]).documents == ()
    assert read_documents(()).documents == ()


@pytest.mark.parametrize(
    "source",
    [None, 7, b"bytes", {"id": "text"}, ("only one",), ("a", "b", "c"), ("a", "b", {}, "d"), [["nested"]], [b"x"]],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_unsupported_types_are_refused_in_both_error_modes(source, on_error):
    with pytest.raises(ConfigError):
        read_documents(source, on_error=on_error)


@pytest.mark.parametrize("option", [{"encoding": "utf-99"}, {"on_error": "ignore"}])
def test_invalid_options_are_refused_before_reading(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        read_documents([], **option)


# Folders


def test_folder_is_read_in_sorted_order(folder):
    result = read_documents(folder)
    assert names(result) == ["a.txt", "b.md", "c.rst"]
    assert result.skipped == (folder / ".secret.txt", folder / "sub" / ".hidden", folder / "sub" / "image.png")


def test_links_to_folders_are_not_followed(folder):
    (folder / "loop").symlink_to(folder)
    result = read_documents(folder)
    assert len(result.documents) == 3
    assert folder / "loop" in result.skipped


def test_file_and_link_to_it_are_read_once(folder):
    (folder / "z.txt").symlink_to(folder / "a.txt")
    assert names(read_documents(folder)) == ["a.txt", "b.md", "c.rst"]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_folder_without_a_readable_file_is_an_error(tmp_path, on_error):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    if on_error == "raise":
        with pytest.raises(UnreadableDocumentError, match="no readable file") as caught:
            read_documents(tmp_path)
        assert ".md" in caught.value.next_step
    else:
        result = read_documents(tmp_path, on_error="skip")
        assert [type(e) for e in result.errors] == [UnreadableDocumentError]
        assert result.skipped == (tmp_path / "image.png",)


def test_bad_files_are_reported_and_the_rest_is_read(folder):
    (folder / "bad1.txt").write_bytes(b"\0")
    (folder / "bad2.txt").write_bytes(b"\xff")
    (folder / "bad3.txt").write_text(" ")
    (folder / "bad4.txt").write_text(LONG_LINE)
    (folder / "bad5.txt").symlink_to("nowhere")
    result = read_documents(folder, on_error="skip")
    assert names(result) == ["a.txt", "b.md", "c.rst"]
    assert [type(e) for e in result.errors] == [
        UnreadableDocumentError,
        UnreadableDocumentError,
        EmptyDocumentError,
        UnreadableDocumentError,
        UnreadableDocumentError,
    ]
    assert all(f"bad{i}.txt" in e.where for i, e in enumerate(result.errors, start=1))
    with pytest.raises(UnreadableDocumentError):
        read_documents(folder)


# Paths that cannot be read


def test_missing_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableDocumentError, match="no such file") as caught:
        read_documents(Path("missing.txt"))
    assert caught.value.where == "missing.txt"
    assert str(tmp_path) in caught.value.next_step


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(UnreadableDocumentError, match="no such file"):
        read_file(tmp_path / "a" / "b.txt")


def test_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a.txt").symlink_to("b.txt")
    (tmp_path / "b.txt").symlink_to("a.txt")
    with pytest.raises(UnreadableDocumentError):
        read_file(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a\0b.txt", "x" * 5000])
def test_impossible_file_names_are_refused(tmp_path, name):
    with pytest.raises(UnreadableDocumentError) as caught:
        read_documents(tmp_path / name)
    assert "\0" not in caught.value.where


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_devices_are_refused_without_reading_them(path):
    with pytest.raises(UnreadableDocumentError, match="device"):
        read_documents(Path(path))


def test_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UnreadableDocumentError, match="pipe"):
        read_documents(tmp_path)


def test_socket_is_refused():
    folder = Path(tempfile.mkdtemp())  # the name of a socket may have 100 characters, which tmp_path can exceed
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "s.txt"))
            with pytest.raises(UnreadableDocumentError, match="socket"):
                read_file(folder / "s.txt")
    finally:
        shutil.rmtree(folder)


def test_read_file_refuses_a_folder(tmp_path):
    with pytest.raises(UnreadableDocumentError, match="folder") as caught:
        read_file(tmp_path)
    assert "read_documents" in caught.value.next_step


AS_NOBODY = """
import os, sys
from pathlib import Path
from kv_memory.documents import read_documents
from kv_memory.errors import UnreadableDocumentError
root = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
result = read_documents([root / "file.txt", root / "locked" / "a.txt", root / "tree"], on_error="skip")
for error in result.errors:
    print(type(error).__name__, "|", error.what, "|", error.where)
print("READ", [d.text for d in result.documents])
try:
    read_documents(root / "tree")
except UnreadableDocumentError as error:
    print("RAISED", error.what)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_files_and_folders_without_permission_are_reported():
    root = Path(tempfile.mkdtemp())  # tmp_path lies below a folder that others may not enter
    try:
        root.chmod(0o755)
        for name in ("file.txt", "locked/a.txt", "tree/a.txt", "tree/locked/b.txt"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(f"text of {name}")
        for name in ("file.txt", "locked", "tree/locked"):
            (root / name).chmod(0)
        # Permissions do not bind root, so root's run reads as another user, in a process of its own.
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(root)], capture_output=True, text=True, timeout=60, cwd="/"
        )
        if "Operation not permitted" in done.stderr:
            pytest.skip("this root may not become another user")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"UnreadableDocumentError | permission denied | {root}/file.txt",
            f"UnreadableDocumentError | permission denied | {root}/locked/a.txt",
            f"UnreadableDocumentError | permission denied | {root}/tree/locked",
            "READ ['text of tree/a.txt']",
            "RAISED permission denied",
        ]
    finally:
        for name in ("locked", "tree/locked"):
            (root / name).chmod(0o755)
        shutil.rmtree(root)


# Texts and ids


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("", EmptyDocumentError),
        (("id", " \n"), EmptyDocumentError),
        ("a\0", UnreadableDocumentError),
        ("\ud800", UnreadableDocumentError),
        pytest.param(LONG_LINE, UnreadableDocumentError, id="long line"),
        (Document(id="a", text=LONG_LINE), UnreadableDocumentError),
    ],
)
def test_bad_texts_are_refused_or_skipped(source, error):
    with pytest.raises(error):
        read_documents(source)
    result = read_documents(["good", source], on_error="skip")
    assert [d.text for d in result.documents] == ["good"]
    assert [type(e) for e in result.errors] == [error]


def test_repeated_id_with_the_same_text_is_kept_once():
    result = read_documents([("a", "text", {"n": 1}), ("b", "other"), ("a", "text", {"n": 2}), "s", "s"])
    assert [d.id for d in result.documents][:2] == ["a", "b"]
    assert len(result.documents) == 3
    assert result.documents[0].metadata == {"n": 1}


def test_repeated_id_with_different_texts_is_refused():
    source = [("a", "text"), ("a", "other text")]
    with pytest.raises(DocumentError) as caught:
        read_documents(source)
    assert caught.value.where == "a"
    result = read_documents(source, on_error="skip")
    assert [d.text for d in result.documents] == ["text"]
    assert [type(e) for e in result.errors] == [DocumentError]
