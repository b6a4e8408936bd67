"""Split a text into passages with a maximum number of tokens.

The text is split into *pieces*: paragraphs; if one is too long, its sentences, then its lines, then stretches that end
at a word or, as the last resort, at any character. Passages are then filled with pieces from left to right. Token
counts do not add up exactly, so every finished passage is counted as a whole, and split again if it is too long.

Counting takes most of the time, so it happens in a dozen calls with many strings each, not once per candidate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from kv_memory.errors import ConfigError

CountTokens = Callable[[list[str]], list[int]]

LINE = re.compile(r"[^\n]*\n|[^\n]+")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]")
UNDERLINE = re.compile(r" {0,3}([=\-~^])\1{2,}\s*$")
FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")  # ```this``` is inline code
# The second alternative is for Chinese and Japanese, which put no space between sentences.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？｡][”’」』）]*")  # noqa: RUF001
_LINE_END = re.compile(r"(?<=\S)[^\S\n]*(?=\n)")
_SPACE = re.compile(r"\s")

# A token of prose has about 4 characters, and hardly ever more than 32. A piece with more characters per allowed token
# is split without counting: tokenizers are slow on a string of a megabyte, and warn about it.
_CHARS_PER_TOKEN, _MAX_CHARS_PER_TOKEN = 4, 32


@dataclass(frozen=True, slots=True)
class _Piece:
    """`text[start:end]`, with the white space before it."""

    start: int
    end: int
    heading_end: int = 0  # no sentence or line is split off before this offset, so that a heading stays with its text
    code: bool = False  # a fenced block, where full stops do not end sentences
    n_tokens: int | None = None  # None if the piece is not counted yet, or is too long to be counted


def split_passages(text: str, *, max_tokens: int | None, count_tokens: CountTokens) -> list[str]:
    """Split a text into passages, at paragraph boundaries where possible.

    Every character that is not white space is in exactly one passage, in order. A Markdown heading stays with the text
    below it, and a fenced code block stays whole if it fits.

    Args:
        text: Text of the document.
        max_tokens: Maximum length of a passage in tokens; None keeps the whole text as one passage.
        count_tokens: Function that counts the tokens of each string, without special tokens.

    Returns:
        Passages that are not blank, without blank lines around them; an empty list for a blank text.

    Raises:
        ConfigError: `max_tokens` is below 1, or a single character takes more tokens than that.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}", where="max_tokens")
    if not text.strip():
        return []
    if max_tokens is None:
        return [text.strip()]
    # A single line that fits is one passage. Longer ones are not even counted, see _MAX_CHARS_PER_TOKEN; white space in
    # front belongs to the first piece, and counts.
    line = text.rstrip()
    if "\n" not in line and not line[0].isspace() and len(line) <= max_tokens * _MAX_CHARS_PER_TOKEN:
        (n_tokens,) = count_tokens([line])
        if n_tokens <= max_tokens:
            return [line]
    return _Splitter(text, max_tokens, count_tokens).passages()


class _Splitter:
    def __init__(self, text: str, max_tokens: int, count_tokens: CountTokens) -> None:
        self._text = text
        self._max_tokens = max_tokens
        self._count_tokens = count_tokens

    def passages(self) -> list[str]:
        # 1. Split into pieces that fit: paragraphs, then sentences, lines, and stretches of those that are too long.
        pieces = self._counted(_paragraphs(self._text))
        for cut in (self._sentences, self._lines):
            pieces = self._counted(part for p in pieces for part in (cut(p) if self._too_long(p) else [p]))
        while any(self._too_long(p) for p in pieces):
            pieces = self._counted(part for p in pieces for part in (self._stretches(p) if self._too_long(p) else [p]))
        # 2. Fill passages with pieces, and split those that are too long as a whole string.
        groups = self._checked(self._filled(pieces))
        # 3. Join a tiny last passage with the one before.
        return [self._string(group) for group in self._with_full_tail(groups)]

    def _too_long(self, piece: _Piece) -> bool:
        return piece.n_tokens is None or piece.n_tokens > self._max_tokens

    def _counted(self, pieces: Iterable[_Piece]) -> list[_Piece]:
        """The pieces with their token counts, from one call; those far too long stay uncounted."""
        found = list(pieces)
        limit = self._max_tokens * _MAX_CHARS_PER_TOKEN
        todo = [i for i, p in enumerate(found) if p.n_tokens is None and p.end - p.start <= limit]
        counts = self._count_tokens([self._text[found[i].start : found[i].end] for i in todo]) if todo else []
        for i, n_tokens in zip(todo, counts, strict=True):
            found[i] = replace(found[i], n_tokens=n_tokens)
        return found

    def _sentences(self, piece: _Piece) -> Iterator[_Piece]:
        ends = () if piece.code else (m.end() for m in _SENTENCE_END.finditer(self._text, piece.start, piece.end))
        return self._cut(piece, ends)

    def _lines(self, piece: _Piece) -> Iterator[_Piece]:
        return self._cut(piece, (m.start() for m in _LINE_END.finditer(self._text, piece.start, piece.end)))

    def _cut(self, piece: _Piece, ends: Iterable[int]) -> Iterator[_Piece]:
        start, first = piece.start, max(piece.start, piece.heading_end)
        for end in [*(e for e in ends if first < e < piece.end), piece.end]:
            yield _Piece(start, end, piece.heading_end if start == piece.start else 0, piece.code)
            start = end

    def _stretches(self, piece: _Piece) -> Iterator[_Piece]:
        """Parts of about equal length, each ending at a word if there is one in its second half."""
        start = self._first(piece.start, piece.end)
        length = piece.end - start
        if length == 1 and piece.start == start:
            raise ConfigError(
                f"one character, {self._text[start]!r}, takes {piece.n_tokens} tokens of {self._max_tokens} allowed",
                where="max_tokens",
                next_step="Allow longer passages; 64 tokens is a sensible minimum.",
            )
        if piece.n_tokens is None:
            n_parts = -(-length // (self._max_tokens * _CHARS_PER_TOKEN))
        else:
            # A tenth more parts than needed, because a part of average length is too long half the time.
            n_parts = -(-piece.n_tokens * 11 // (self._max_tokens * 10))
        size = -(-length // max(2, n_parts))
        while start < piece.end:
            end = min(start + size, piece.end)
            if end < piece.end:
                spaces = [m.start() for m in _SPACE.finditer(self._text, start + size // 2 + 1, end + 1)]
                end = spaces[-1] if spaces else end
            yield _Piece(start, end)
            start = self._first(end, piece.end)

    def _first(self, start: int, end: int) -> int:
        """Offset of the first character at or after `start` that is not white space; `end` if there are only spaces."""
        while start < end and self._text[start].isspace():
            start += 1
        return start

    def _filled(self, pieces: Iterable[_Piece]) -> list[list[_Piece]]:
        groups: list[list[_Piece]] = []
        n_tokens = 0
        for piece in pieces:
            size = _size(piece)
            if groups and n_tokens + size <= self._max_tokens:
                groups[-1].append(piece)
                n_tokens += size
            else:
                groups.append([piece])
                n_tokens = size
        return groups

    def _checked(self, groups: list[list[_Piece]]) -> list[tuple[list[_Piece], int]]:
        """The groups with the token counts of their whole strings; groups that are too long are split."""
        done: list[tuple[list[_Piece], int]] = [(group, -1) for group in groups]
        while todo := [i for i, (_, n_tokens) in enumerate(done) if n_tokens < 0]:
            counts = self._count_tokens([self._string(done[i][0]) for i in todo])
            for i, n_tokens in zip(todo, counts, strict=True):
                done[i] = (done[i][0], n_tokens)
            done = [
                part
                for group, n in done
                for part in ([(group, n)] if n <= self._max_tokens else self._halves(group, n))
            ]
        return done

    def _halves(self, group: list[_Piece], n_tokens: int) -> list[tuple[list[_Piece], int]]:
        if len(group) > 1:
            middle = _middle(group)
            return [(group[:middle], -1), (group[middle:], -1)]
        piece = group[0]
        bare = replace(piece, start=self._first(piece.start, piece.end), n_tokens=n_tokens)
        parts = [bare] if bare.start > piece.start else self._stretches(bare)  # first, drop its indentation
        return [([part], -1) for part in parts]

    def _with_full_tail(self, groups: list[tuple[list[_Piece], int]]) -> list[list[_Piece]]:
        """Join a tiny last passage to the previous one, or split the two evenly, if either fits."""
        found = [group for group, _ in groups]
        if len(groups) < 2 or groups[-1][1] * 8 >= self._max_tokens:
            return found
        joined = [*found[-2], *found[-1]]
        middle = _middle(joined)
        options = [[joined], [joined[:middle], joined[middle:]]]
        counts = self._count_tokens([self._string(group) for option in options for group in option])
        if counts[0] <= self._max_tokens:
            return [*found[:-2], *options[0]]
        if max(counts[1:]) <= self._max_tokens and min(counts[1:]) > groups[-1][1]:
            return [*found[:-2], *options[1]]
        return found

    def _string(self, group: list[_Piece]) -> str:
        """The passage, without blank lines and spaces around it but with the indentation of its first line."""
        start, end = self._first(group[0].start, group[-1].end), group[-1].end
        # The start of the text loses its indentation, as it does without a limit.
        line_start = self._text.rfind("\n", group[0].start, start) + 1 if group[0].start else 0
        return self._text[line_start or start : end].rstrip()


def _size(piece: _Piece) -> int:
    """Token count of a piece, at least 1: otherwise `_middle` could not halve a group of empty pieces."""
    return max(1, piece.n_tokens or 0)


def _middle(group: list[_Piece]) -> int:
    """The index that splits two or more pieces into halves of about equal tokens, neither of them empty."""
    total, before = sum(map(_size, group)), 0
    for index, piece in enumerate(group[:-1]):
        before += _size(piece)
        if before * 2 >= total:
            # Split after or before this piece, whichever is closer to one half.
            overshoot = 2 * before - total
            return index + 1 if index == 0 or overshoot <= _size(piece) else index
    return len(group) - 1


def _paragraphs(text: str) -> list[_Piece]:
    """Split into blocks between blank lines, each with the white space before it; headings join the next block."""
    pieces: list[_Piece] = []
    start = end = heading_end = 0
    fence, code, open_block, n_lines = "", False, False, 0

    def close() -> None:
        nonlocal start, heading_end, code, open_block
        if open_block:
            pieces.append(_Piece(start, end, heading_end, code))
            start, heading_end = end, 0
        code = open_block = False

    for line in LINE.finditer(text):
        content = line[0].rstrip()
        mark = None if not content else FENCE.match(content)
        if fence:
            end = line.start() + len(content) if content else end
            if mark and mark[1].startswith(fence) and content.strip() == mark[1]:
                fence = ""
                close()
        elif not content:
            close()
        elif _HEADING.match(content):
            close()
            end = heading_end = line.start() + len(content)
        elif open_block and not code and n_lines == 1 and UNDERLINE.match(content):
            # The single line above was a heading: the block stays open until text follows.
            end = heading_end = line.start() + len(content)
            open_block = False
        else:
            if mark:
                close()
                fence, code = mark[1], True
            n_lines = n_lines + 1 if open_block else 1
            open_block, end = True, line.start() + len(content)
    close()
    if end > start:  # a heading with nothing below it, or a fence that never closes
        pieces.append(_Piece(start, end, 0, code))
    return pieces
