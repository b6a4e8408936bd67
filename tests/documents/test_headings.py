from __future__ import annotations

import pytest

from kv_memory.documents import split_passages
from kv_memory.documents.headings import headings_above

TEXT = """Before everything.

# Guide

First words.

## Harbour ##

Of the harbour.

```
# no heading
```

More of the harbour.

### Pier four

Of the pier.

## Library

Of the library.

Museum
======

Of the museum.

Tickets
-------

Of the tickets.

a | b
--- | ---
# Last
"""


def test_the_headings_above_every_passage_are_found():
    above = {
        "Before everything.": "",
        "First words.": "Guide",
        "## Harbour ##\n\nOf the harbour.": "Guide",  # the heading at its start is in its text
        "More of the harbour.": "Guide\nHarbour",
        "Of the pier.": "Guide\nHarbour\nPier four",
        "Of the library.\n\nMuseum\n======": "Guide\nLibrary",
        "Of the museum.": "Museum",
        "Of the tickets.": "Museum\nTickets",
        "--- | ---\n# Last": "Museum\nTickets",
    }
    assert dict(zip(above, headings_above(TEXT, list(above)), strict=True)) == above


def test_the_passages_of_the_splitter_are_found():
    passages = split_passages(TEXT, max_tokens=8, count_tokens=lambda texts: [len(text.split()) for text in texts])
    found = dict(zip(passages, headings_above(TEXT, passages), strict=True))
    assert len(found) > 5
    assert next(above for text, above in found.items() if "Of the tickets." in text) in {"Museum", "Museum\nTickets"}


def test_a_heading_at_the_start_of_a_passage_is_not_above_it():
    text = "# A\n\n## B\n\none\n\n## C\n\ntwo\n"
    assert headings_above(text, ["# A\n\n## B\n\none", "## C\n\ntwo"]) == ["", "A"]


def test_the_title_is_left_out():
    text = "# Guide\n\n## Harbour\n\none\n\ntwo\n"
    assert headings_above(text, ["two"], title="guide") == ["Harbour"]


@pytest.mark.parametrize("text", ["", "plain words", "#hashtag\n\nwords", "---\n\nwords", "a\nb\n---\n\nwords"])
def test_a_text_without_headings_has_none(text):
    assert headings_above(text, ["words"]) == [""]


def test_equal_passages_are_found_in_order():
    text = "# A\n\nsame\n\n# B\n\nsame\n"
    assert headings_above(text, ["same", "same"]) == ["A", "B"]


def test_a_passage_that_is_not_in_the_text_takes_the_headings_before_it():
    assert headings_above("# A\n\none\n\n# B\n\ntwo", ["one", "else", "two"]) == ["A", "A", "B"]
