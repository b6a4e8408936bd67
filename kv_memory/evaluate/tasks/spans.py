"""Spans: measures how well the text of a document itself is remembered.

A small model's answers hardly depend on a long document, so questions show little of the loss by compression. The
words of the document do depend on it: given the first eight words of a span, the full cache continues with the rest at
0.2 to 0.5 nats per token on smollm2, against 3.4 without the document.
"""

from __future__ import annotations

import random
import re

from kv_memory.datasets import read_examples, split_by_hash
from kv_memory.errors import ConfigError
from kv_memory.evaluate.cases import Case, Query
from kv_memory.evaluate.tasks.task import TaskSettings, choose
from kv_memory.model.backbone import Backbone

# A question, so that it also works in a chat template. Continuing the bare words, without a request or after
# the document's own wrapper, gave the same figures; naming the words in the request gave worse ones.
REQUEST = "Repeat the passage word for word."
N_SPANS = 4
GIVEN_WORDS = 8
SPAN_TOKENS = 32
MIN_TOKENS = 128  # per document; four spans with their first words take up 170 tokens, and short texts get fewer spans


def spans_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Documents of any corpus with up to four spans each, drawn by the seed.

    Raises:
        ConfigError: No corpus is named.
        DatasetError: The corpus is missing, or contains no document of a suitable length.
    """
    if not settings.corpus:
        raise ConfigError(
            "spans needs a corpus", where="corpus", next_step="Set corpus to a folder, a file, or e.g. squad."
        )
    what = ", ".join(settings.corpus)
    examples = (
        example
        for source in settings.corpus
        for example in read_examples(source, split="dev", data=settings.data)
        if settings.held_out is None or split_by_hash(example.id, settings.held_out)
    )
    return [
        Case(id=example.id, text=example.context, queries=spans)
        for example in choose(examples, backbone, settings, what=what, least=MIN_TOKENS)
        if (spans := draw_spans(backbone, example.context, seed=f"{settings.seed}:{example.id}"))
    ]


def draw_spans(backbone: Backbone, text: str, *, seed: str) -> tuple[Query, ...]:
    """One span from each quarter of a text: eight words are given, and the 32 tokens that follow are measured.

    A quarter that is too near the end of a short text yields no span.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    draw = random.Random(seed)  # a str is hashed by SHA-512: the same on every machine
    spans = []
    for quarter in range(N_SPANS):
        first, end = len(words) * quarter // N_SPANS, len(words) * (quarter + 1) // N_SPANS
        last = min(end, len(words) - GIVEN_WORDS - SPAN_TOKENS)  # a token is a word at most, so 32 tokens are left
        if last <= first:
            continue
        at = draw.randrange(first, last)
        begin, until = words[at][0], words[at + GIVEN_WORDS - 1][1]
        tail = text[until : words[at + GIVEN_WORDS + SPAN_TOKENS - 1][1]]
        offsets = backbone.encode_with_offsets(tail)[1][:SPAN_TOKENS]
        tail = tail[: offsets[-1][1]]
        span = (begin, until + len(tail))
        spans.append(Query(text=REQUEST, given=text[begin:until], references=(tail,), span=span))
    return tuple(spans)
