"""Encodings of files: labels, declarations, and bytes that are invalid in a text that is otherwise sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_memory.documents import read_file
from kv_memory.documents.decoding import check_encoding, decode_text
from kv_memory.errors import UnreadableDocumentError


def decoded(raw: bytes, encoding: str = "utf-8", *, is_page: bool = False) -> str:
    return decode_text(raw, encoding=encoding, where="a", is_page=is_page).text


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("gb2312", "gbk", "镕朱"),  # GBK has more characters than GB 2312
        ("latin1", "cp1252", "“€”"),
        ("ISO-8859-1", "cp1252", "“€”"),
        ("us-ascii", "cp1252", "“€”"),
        ("ascii", "cp1252", "“€”"),
        ("latin-1", "cp1252", "“€”"),  # Python's spelling
        ("iso-8859-9", "cp1254", "€ş"),
        ("shift-jis", "cp932", "①"),
        ("euc-kr", "cp949", "똠"),
        ("ks_c_5601-1987", "cp949", "똠"),
        ("tis-620", "cp874", "…ก"),
        ("cp437", "cp437", "é╬"),  # only Python knows it
        ("utf-32-le", "utf-32-le", "é"),
        ("unicode-1-1-utf-8", "utf-8", "é"),
    ],
)
def test_labels_mean_what_browsers_take_them_for(label, codec, text):
    assert check_encoding(label) == label
    assert decoded(text.encode(codec), label) == text


@pytest.mark.parametrize(
    ("declaration", "codec", "text"),
    [
        ("<meta charset=gb2312>", "gbk", "镕朱"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1">', "cp1252", "“€”"),
        ("<meta charset='euc-kr'>", "cp949", "똠"),
        ('<?xml version="1.0" encoding="x-sjis"?>', "cp932", "①日本"),
        ("<meta charset=utf-16>", "utf-8", "é"),  # read as ASCII, so it cannot be UTF-16
        ("<meta charset=nonsense>", "utf-8", "é"),
    ],
)
def test_pages_may_declare_their_encoding(declaration, codec, text):
    assert decoded(f"{declaration}<p>{text}".encode(codec), is_page=True).endswith(text)


@pytest.mark.parametrize(
    ("raw", "encoding", "text"),
    [
        ("naïve café ".encode() + b"\xe9!", "utf-8", "naïve café \ufffd!"),
        ("日本".encode()[:-1], "utf-8", "日\ufffd"),  # cut off in the middle of a character
        ("\ufeffé".encode() + b"\xff", "cp1252", "é\ufffd"),
        (("日本語" * 10).encode("shift_jis") + b"\x81", "shift_jis", "日本語" * 10 + "\ufffd"),
    ],
)
def test_a_few_invalid_bytes_are_replaced_and_noted(raw, encoding, text):
    found = decode_text(raw, encoding=encoding, where="a")
    assert found.text == text
    assert found.notes[0].startswith("1 invalid byte(s) of ")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (b"<meta charset=utf-8><p>" + b"plain " * 20 + b"words \xff here", "plain words \ufffd here"),
        (
            b"<meta charset=gb2312><p>" + b"plain " * 20 + b"\x80 \xd6\xd0",
            "\ufffd 中",
        ),  # browsers show a euro sign, which Python's GBK lacks
        (b'<?xml version="1.0" encoding="euc-jp"?><p>' + b"word " * 100 + b"\x8f \xff", "word \ufffd \ufffd"),
    ],
)
def test_a_page_that_declares_its_encoding_may_be_plain_beside_its_invalid_bytes(page, text):
    found = decode_text(page, encoding="utf-8", where="a", is_page=True)
    assert found.text.endswith(text) and "replaced by U+FFFD" in found.notes[0]


def test_a_declaration_does_not_turn_a_text_of_another_encoding_into_replacements():
    with pytest.raises(UnreadableDocumentError, match="at byte offset"):
        decoded(b"<meta charset=utf-8><p>" + "Füße, Größe, Äpfel".encode("cp1252"), is_page=True)


@pytest.mark.parametrize(("codec", "stated"), [("cp1252", "utf-8"), ("gbk", "utf-8"), ("gbk", "shift_jis")])
def test_a_text_in_another_encoding_is_refused(codec, stated):
    text = "naïve café, déjà vu" if codec == "cp1252" else "镕朱汉字编码" * 20
    with pytest.raises(UnreadableDocumentError, match="at byte offset"):
        decoded(text.encode(codec), stated)


def test_an_encoding_in_which_all_bytes_are_valid_comes_first():
    page = b"<meta charset=windows-1252><p>" + "Ã©".encode("cp1252") * 3 + b"caf\xe9"  # mostly valid as UTF-8
    found = decode_text(page, encoding="utf-8", where="a", is_page=True)
    assert found.text.endswith("Ã©Ã©Ã©café") and found.notes == ()


def test_a_nul_in_a_page_is_replaced_and_noted():
    found = decode_text(b"<p>one\0two", encoding="utf-8", where="a", is_page=True)
    assert found.text == "<p>one\ufffdtwo"
    assert found.notes == ("1 NUL character(s) replaced by U+FFFD",)


@pytest.mark.parametrize("raw", ["<p>x".encode("utf-16-le"), b"<p>" + b"\0\1" * 500, b"\0" * 40])
def test_a_binary_file_is_no_page(raw):
    with pytest.raises(UnreadableDocumentError, match="NUL byte"):
        decoded(raw, is_page=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.md", "Text.\n\n![chart](data:image/png;base64,{})\n\nMore."),
        ("b.md", "Text. ![chart][1]\n\n[1]: <data:image/svg+xml;charset=utf8;base64,{}>\n\nMore."),
        ("c.rst", "Text.\n\n.. image:: data:image/png;base64,{}\n\nMore."),
        ("d.txt", "Text. data:application/octet-stream;base64,{} More."),
        ("e.html", "Text. <a href='data:image/png;base64,{}'>More.</a>"),
    ],
)
def test_embedded_files_are_no_text(tmp_path: Path, name, content):
    (tmp_path / name).write_text(content.format("iVBORw0KGgo" * 10_000))
    document = read_file(tmp_path / name)
    assert len(document.text) < 120 and "Text." in document.text and "More." in document.text


def test_a_short_example_of_a_data_url_stays(tmp_path: Path):
    (tmp_path / "a.md").write_text("Write `data:image/gif;base64,R0lGOD` for it.")
    assert "R0lGOD" in read_file(tmp_path / "a.md").text


def test_a_page_that_shrinks_to_next_to_nothing_is_noted(tmp_path: Path):
    (tmp_path / "a.html").write_text(f"<p>Please enable scripts.<script>{'x' * 90_000}</script>")
    (note,) = read_file(tmp_path / "a.html").notes
    assert note.startswith("22 characters of text in 90,0") and "save the page from a browser" in note


def test_remarks_are_reported_and_stored(tmp_path: Path, memory):
    (tmp_path / "a.md").write_bytes("naïve café ".encode() + b"\xe9 is open.")
    report = memory.add(tmp_path / "a.md")
    assert report.notes == [f"1 invalid byte(s) of utf-8 replaced by U+FFFD [{report.added[0]}]"]
    assert memory.document(report.added[0]).metadata["reader_notes"] == [
        "1 invalid byte(s) of utf-8 replaced by U+FFFD"
    ]
    assert memory.add(tmp_path / "a.md").notes == []
