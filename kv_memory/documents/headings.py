"""The headings above each passage of a document: the sections that it belongs to.

A passage deep in a section rarely repeats what the section is about; its headings say it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from kv_memory.documents.splitter import FENCE, LINE, UNDERLINE

_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_LEVELS = "=-~^"  # of underlines, as Markdown and most reStructuredText order them
_MOST_CHARACTERS = 200  # of a heading; a longer line is a paragraph by mistake


class _Heading(NamedTuple):
    start: int  # of its line
    level: int
    title: str


def headings_above(text: str, passages: Sequence[str], *, title: str = "") -> list[str]:
    """The headings of the sections around the start of each passage, one a line, from the outermost inwards.

    Headings are those of Markdown, of pages (which were read as Markdown), and underlined lines. A heading inside the
    passage, or at its start, is part of its text and not listed.

    Args:
        text: Text of the document.
        passages: Its passages in order, as `split_passages` returns them.
        title: Title of the document, which is left out where it is a heading.
    """
    headings, above = _headings(text), list[_Heading]()
    found: list[str] = []
    position = index = 0
    for passage in passages:
        start = text.find(passage, position)
        if start >= 0:
            position = start + len(passage)
            while index < len(headings) and headings[index].start <= start:
                heading = headings[index]
                above = [each for each in above if each.level < heading.level]
                if heading.start == start:
                    break  # it is in the passage, and will be above the next one
                above.append(heading)
                index += 1
        found.append("\n".join(each.title for each in above if each.title.casefold() != title.casefold()))
    return found


def _headings(text: str) -> list[_Heading]:
    """All headings outside fenced code, in order."""
    headings: list[_Heading] = []
    fence, n_lines, previous = "", 0, _Heading(0, 0, "")
    for line in LINE.finditer(text):
        content = line[0].rstrip()
        mark = FENCE.match(content)
        if fence or mark:
            if not fence:
                fence = mark[1] if mark else ""
            elif mark and mark[1].startswith(fence) and content.strip() == mark[1]:
                fence = ""
            n_lines = 0
        elif heading := _ATX.match(content):
            title = heading[2].rstrip().rstrip("#").rstrip()
            headings += [_Heading(line.start(), len(heading[1]), title)] if title else []
            n_lines = 0
        elif n_lines == 1 and (under := UNDERLINE.match(content)):
            headings.append(previous._replace(level=1 + _LEVELS.index(under[1])))
            n_lines = 0
        else:
            n_lines = n_lines + 1 if content else 0
            previous = _Heading(line.start(), 0, content.strip())
    return [each for each in headings if len(each.title) <= _MOST_CHARACTERS]
