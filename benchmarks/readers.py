"""What is lost when real files are read: pages, PDFs and texts of a folder, each compared with a plain second reading.

    python benchmarks/readers.py ~/pages ~/papers             # a table
    python benchmarks/readers.py ~/pages --json --limit 300   # one object per file

A page's second reading is the text between its tags by Python's own `html.parser`, without scripts, navigation, form
controls and annotations; `lost` is the share of its distinct words that the document lacks, `more` the share of the
document's words that it lacks. A malformed page loses words in the second reading. Other files have none.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from bs4 import BeautifulSoup

from kv_memory import KVMemoryError
from kv_memory.documents import read_file
from kv_memory.documents.decoding import decode_text
from kv_memory.documents.pages import NO_TEXT
from kv_memory.documents.parsers import FILE_TYPES
from kv_memory.retrieval.tokenize import words_of

MANY = 0.05  # share of words from which a page is listed


@dataclass
class Row:
    """One file: what became of it, its length in bytes and characters, and the shares of words lost and gained."""

    file: str
    outcome: str
    seconds: float
    n_bytes: int
    n_characters: int = 0
    lost: float | None = None
    more: float | None = None
    notes: tuple[str, ...] = ()


def row_of(path: Path) -> Row:
    """Read one file both ways."""
    start_s = time.perf_counter()
    try:
        document = read_file(path)
    except KVMemoryError as error:
        return Row(
            str(path), f"{type(error).__name__}: {error.what}", time.perf_counter() - start_s, path.stat().st_size
        )
    elapsed_s = time.perf_counter() - start_s
    row = Row(str(path), "read", elapsed_s, path.stat().st_size, len(document.text), notes=document.notes)
    if document.metadata["file_type"] == "html":
        theirs, ours = _plain_words(path), set(words_of(document.text))
        row.lost = len(theirs - ours) / max(1, len(theirs))
        row.more = len(ours - theirs) / max(1, len(ours))
    return row


def _plain_words(path: Path) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = decode_text(path.read_bytes(), encoding="utf-8", where=str(path), is_page=True)
        soup = BeautifulSoup(decoded.text, "html.parser")
    for tag in soup.select(f"{NO_TEXT}, title"):
        tag.extract()
    return set(words_of(soup.get_text(" ")))


def main() -> None:
    """Print what became of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=int, help="number of files of each type, drawn by a fixed seed")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    args = parser.parse_args()
    by_type: dict[str, list[Path]] = {}
    for path in sorted(path for folder in args.folders for path in folder.rglob("*") if path.is_file()):
        if kind := FILE_TYPES.get(path.suffix.lower()):
            by_type.setdefault(kind, []).append(path)
    for kind, paths in by_type.items():
        chosen = random.Random(0).sample(paths, min(len(paths), args.limit or len(paths)))
        rows = []
        for path in chosen:
            rows.append(row_of(path))
            if args.json:
                print(json.dumps(asdict(rows[-1])), flush=True)
        if not args.json:
            _print(kind, rows)
    if not by_type:
        sys.exit("There is no file of a known type in these folders.")


def _print(kind: str, rows: list[Row]) -> None:
    read = [row for row in rows if row.outcome == "read"]
    pages = [row for row in read if row.lost is not None]
    print(f"{kind}: {len(rows)} files, {len(read)} read, {sum(bool(row.notes) for row in read)} with a remark")
    for outcome, n in Counter(row.outcome for row in rows if row.outcome != "read").most_common():
        print(f"  {n:>5}  {outcome[:110]}")
    for note, n in Counter(note.lstrip("0123456789,. ") for row in read for note in row.notes).most_common():
        print(f"  {n:>5}  remark: {note[:100]}")
    print(f"  slowest: {max(row.seconds for row in rows):.2f} s")
    if pages:
        lost = sorted(row.lost or 0 for row in pages)
        print(
            f"  words lost: median {lost[len(lost) // 2]:.4f}, 99% of pages at most {lost[len(lost) * 99 // 100]:.4f}"
        )
        for row in sorted(pages, key=lambda row: -(row.lost or 0))[:10]:
            if (row.lost or 0) > MANY:
                print(f"  lost {row.lost:.3f}, more {row.more:.3f}: {row.n_characters:,} characters of {row.file}")


if __name__ == "__main__":
    main()
