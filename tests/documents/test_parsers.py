from __future__ import annotations

import codecs
import gzip
import io
import zipfile
import zlib
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter

from kv_memory.documents import read_file
from kv_memory.documents.loaders import MAX_LINE_BYTES
from kv_memory.errors import ConfigError, EmptyDocumentError, UnreadableDocumentError


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_pdf(*pages: str, title: str | None = None, password: str | None = None, cipher: str = "AES-256") -> bytes:
    """A PDF with one line of text on each page, written by hand but for its last step."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body, offsets = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    body += (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    )
    if title is None and password is None:
        return body.encode("latin-1")
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(body.encode("latin-1"))))
    if title is not None:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(user_password=password, owner_password="owner", algorithm=cipher)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


# Text, Markdown, reStructuredText


def test_text_file_is_read_with_its_metadata(tmp_path):
    path = write(tmp_path, "a.txt", "Hello.\nWorld.\n")
    document = read_file(path)
    assert document.text == "Hello.\nWorld.\n"
    assert document.id == path.resolve().as_posix()
    assert document.source_uri == path.resolve().as_uri()
    assert document.metadata == {"file_name": "a.txt", "file_type": "text", "size_bytes": 14}


def test_newlines_are_normalised(tmp_path):
    assert read_file(write(tmp_path, "a.txt", "a\r\nb\rc\n")).text == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        ("a.md", "intro\n\n## The *title* ##\n\n# Other", "The *title*"),
        ("b.MD", "```sh\n# a comment\n```\n\nReal title\n=====\n", "Real title"),
        ("c.markdown", "---\nauthor: me\ntitle: 'From the front'\n---\n# Heading", "From the front"),
        ("d.md", "---\nauthor: me\n---\n# Heading", "Heading"),
        ("e.rst", "=======\nTitle\n=======\n\n# no heading here", "Title"),
        ("f.rst", "Sub\n~~~~\n", "Sub"),
        ("g.md", "no heading, `#hashtag` only\n\n#hashtag", None),
        ("h.txt", "# just a line", None),
    ],
)
def test_titles_of_markdown_and_rst(tmp_path, name, text, title):
    assert read_file(write(tmp_path, name, text)).metadata.get("title") == title


@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("stated", ["utf-8", "cp1252"])
def test_byte_order_mark_overrides_the_given_encoding(tmp_path, mark, codec, stated):
    path = write(tmp_path, "a.txt", mark + "Grüße, 日本".encode(codec))
    assert read_file(path, encoding=stated).text == "Grüße, 日本"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16"])
def test_given_encoding_is_used(tmp_path, encoding):
    path = write(tmp_path, "a.txt", "Grüße".encode(encoding))
    assert read_file(path, encoding=encoding).text == "Grüße"


def test_text_file_of_unknown_type_is_read(tmp_path):
    document = read_file(write(tmp_path, "Makefile.xyz", "all:\n\techo"))
    assert (document.text, document.metadata["file_type"]) == ("all:\n\techo", "text")


def test_link_has_the_id_of_its_target_and_its_own_type(tmp_path):
    target = write(tmp_path, "blob", "# Title")
    link = tmp_path / "a.md"
    link.symlink_to(target)
    document = read_file(link)
    assert document.id == target.resolve().as_posix()
    assert (document.metadata["file_name"], document.metadata["title"]) == ("a.md", "Title")


def test_file_name_that_is_not_utf8_gets_a_utf8_id(tmp_path):
    try:
        path = write(tmp_path, "caf\udce9.txt", "text")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    document = read_file(path)
    assert document.id.endswith("/caf\\xe9.txt")
    assert document.metadata["file_name"] == "caf\\xe9.txt"


# What is no text


def _png() -> bytes:
    return b"\x89PNG\r\n\x1a\n" + zlib.compress(bytes(range(1, 200)))


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "text")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (_png(), "PNG"),
        (_zip(), "ZIP"),
        (gzip.compress(b"text", mtime=0), "gzip"),
        (b"\x7fELF\x02\x01\x01", "ELF"),
        (b"\xff\xd8\xff\xe0\x10JFIF", "JPEG"),
        (b"%PDF-1.4\n%rest", "a PDF"),
        (b"text with a \0 in it", "NUL byte at offset 12"),
        (b"RIFF\x10\0\0\0WAVE\xff\xfe", "NUL byte"),
        ("no mark".encode("utf-16-le"), "NUL byte"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_binary_files_are_refused(tmp_path, content, what, encoding):
    path = write(tmp_path, "a.txt", content)
    with pytest.raises(UnreadableDocumentError, match=what) as caught:
        read_file(path, encoding=encoding)
    assert caught.value.where == path.resolve().as_posix()
    assert caught.value.next_step


def test_binary_file_of_unknown_type_is_refused(tmp_path):
    with pytest.raises(UnreadableDocumentError, match=r"unknown type \.dat.*byte offset 4") as caught:
        read_file(write(tmp_path, "a.dat", b"text\xff"))
    assert "--encoding" in caught.value.next_step


def test_bytes_invalid_in_the_encoding_are_refused(tmp_path):
    with pytest.raises(UnreadableDocumentError, match="utf-8 at byte offset 12, line 3") as caught:
        read_file(write(tmp_path, "a.txt", b"one\r\ntwo\rcaf\xe9\n"))
    assert "`encoding=`" in caught.value.next_step
    assert "`--encoding`" in caught.value.next_step


def test_the_byte_offset_counts_the_byte_order_mark(tmp_path):
    with pytest.raises(UnreadableDocumentError, match="byte offset 4, line 1"):
        read_file(write(tmp_path, "a.txt", codecs.BOM_UTF8 + b"a\xff"))


def test_incomplete_utf16_character_is_refused(tmp_path):
    with pytest.raises(UnreadableDocumentError, match="utf-16-le at byte offset 4"):
        read_file(write(tmp_path, "a.txt", codecs.BOM_UTF16_LE + b"a\0b"))


@pytest.mark.parametrize("encoding", ["utf-99", "base64", "", "a\0b", None])
def test_unknown_encodings_are_refused(tmp_path, encoding):
    with pytest.raises(ConfigError, match="encoding"):
        read_file(write(tmp_path, "a.txt", ""), encoding=encoding)


@pytest.mark.parametrize("content", ["", " \n\t\n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
def test_blank_files_are_refused(tmp_path, content):
    with pytest.raises(EmptyDocumentError):
        read_file(write(tmp_path, "a.md", content))


def test_line_of_5_megabytes_is_refused(tmp_path):
    path = write(tmp_path, "a.txt", "short\n" + "ä" * 2_500_000 + "\nshort\n")
    with pytest.raises(UnreadableDocumentError, match="line 2 has 5,000,000 bytes, the limit is 1,048,576"):
        read_file(path)


def test_line_limit_is_exact(tmp_path):
    assert read_file(write(tmp_path, "a.txt", "ab\n" + "ä" * (MAX_LINE_BYTES // 2) + "\nb")).text
    with pytest.raises(UnreadableDocumentError, match="line 2 has 1,048,577 bytes"):
        read_file(write(tmp_path, "a.txt", "ab\n" + "ä" * (MAX_LINE_BYTES // 2) + "b"))


# HTML

PAGE = """<!DOCTYPE html><html><head><title> My
 page </title><style>p { color: red }</style><script>var hidden = 1;</script></head>
<body><nav><a href="/">Home</a></nav><h1>Head&nbsp;line</h1><p>One <b>bold</b> <a href="https://x.y">word</a>.</p>
<ul><li>first</li><li>second</li></ul><img src="data:image/png;base64,AAAA" alt="picture">
<pre><code>x = 1
  y = snake_case</code></pre><noscript>Enable scripts</noscript><table><tr><th>a</th></tr><tr><td>b</td></tr></table>
</body></html>"""


def test_html_becomes_markdown(tmp_path):
    document = read_file(write(tmp_path, "a.html", PAGE))
    assert document.metadata["title"] == "My page"
    assert document.metadata["file_type"] == "html"
    text = document.text
    assert "# Head line\n\nOne **bold** word." in text
    assert "- first\n- second" in text
    assert "```\nx = 1\n  y = snake_case\n```" in text
    assert "| b |" in text
    for gone in ("My page", "hidden", "color", "Home", "Enable", "https", "base64", "\n\n\n", "\xa0"):
        assert gone not in text


def test_page_without_a_title_uses_its_first_heading(tmp_path):
    assert read_file(write(tmp_path, "a.htm", "<h2>Head <i>line</i></h2>text")).metadata["title"] == "Head line"


def test_page_without_text_is_refused(tmp_path):
    with pytest.raises(EmptyDocumentError, match="no text") as caught:
        read_file(write(tmp_path, "a.html", "<html><body><div id=app></div><script>app()</script></body></html>"))
    assert "scripts" in caught.value.next_step


def test_thousands_of_unclosed_tags_do_not_overflow_the_stack(tmp_path):
    text = read_file(write(tmp_path, "a.html", "".join(f"<p>Line {i}." for i in range(5000)))).text
    assert text.startswith("Line 0.\n")
    assert "Line 4999." in text


@pytest.mark.parametrize(("declared", "codec"), [("ISO-8859-1", "cp1252"), ("shift_jis", "shift_jis")])
def test_page_may_declare_its_encoding(tmp_path, declared, codec):
    words = "“quoted”" if codec == "cp1252" else "日本語"
    path = write(tmp_path, "a.html", f"<meta charset={declared}><p>{words}".encode(codec))
    assert read_file(path).text == words


@pytest.mark.parametrize("declared", ["utf-8", "nonsense"])
def test_page_invalid_in_its_declared_encoding_is_refused(tmp_path, declared):
    with pytest.raises(UnreadableDocumentError, match="utf-8 at byte offset"):
        read_file(write(tmp_path, "a.html", f"<meta charset={declared}><p>caf".encode() + b"\xe9<p>"))


@pytest.mark.parametrize(
    "content", ["a.txt", "http://example.com", '<?xml version="1.0"?><html><p>x</p></html>', "<![if IE]>x"]
)
def test_unusual_pages_are_read_without_a_warning(tmp_path, content):
    assert read_file(write(tmp_path, "a.html", content)).text


# PDF


def test_pdf_is_read_with_its_metadata(tmp_path):
    document = read_file(write(tmp_path, "a.pdf", make_pdf("First page.", "Second page.", title="The title")))
    assert document.text == "First page.\n\nSecond page."
    assert (document.metadata["n_pages"], document.metadata["title"]) == (2, "The title")
    assert document.metadata["file_type"] == "pdf"


def test_pdf_without_a_suffix_is_recognised_by_its_bytes(tmp_path):
    assert read_file(write(tmp_path, "download", make_pdf("Some text."))).text == "Some text."


@pytest.mark.parametrize("cipher", ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"])
def test_pdf_with_an_empty_password_is_read(tmp_path, cipher):
    assert read_file(write(tmp_path, "a.pdf", make_pdf("Open text.", password="", cipher=cipher))).text == "Open text."


def test_encrypted_pdf_is_refused(tmp_path):
    with pytest.raises(UnreadableDocumentError, match="encrypted") as caught:
        read_file(write(tmp_path, "a.pdf", make_pdf("Secret text.", password="secret")))
    assert "password" in caught.value.next_step


def test_scanned_pdf_is_refused(tmp_path):
    with pytest.raises(EmptyDocumentError, match=r"2 page\(s\) and no text") as caught:
        read_file(write(tmp_path, "a.pdf", make_pdf("", "")))
    assert "OCR" in caught.value.next_step


@pytest.mark.parametrize(
    "content", [b"", b"not a PDF at all", make_pdf("x")[:60], _png(), b"%PDF-1.4\n" + b"\0\xff" * 500]
)
def test_broken_pdf_is_refused(tmp_path, content):
    with pytest.raises(UnreadableDocumentError, match="not a readable PDF"):
        read_file(write(tmp_path, "a.pdf", content))
