"""Needle in a haystack: one sentence, unrelated to the essays around it, that a question asks about."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kv_memory.datasets import read_examples
from kv_memory.datasets.read import data_folder
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.cases import Case, Query
from kv_memory.evaluate.tasks.task import TaskSettings, cut, room_for_document
from kv_memory.model.backbone import Backbone

_LENGTHS = (256, 512, 1024, 2048)

_NEEDLES = (
    ("The access code of the {place} {thing} is {number}.", "What is the access code of the {place} {thing}?"),
    ("The {thing} in {place} has the number {number}.", "What number has the {thing} in {place}?"),
    ("For the {thing} of {place} the agreed price is {number} crowns.", "What is the price of the {thing} of {place}?"),
)
_PLACES = ("Skarholm", "Orvik", "Tamberley", "Quellen", "Ostrava Bay", "Minford", "Harrowgate", "Velden")
_THINGS = ("archive", "lighthouse", "observatory", "greenhouse", "boathouse", "vault", "workshop", "chapel")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def needle_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """One document for each length, depth and needle of the grid.

    The same needles are used at every length and depth. Each needle has a haystack with its own random start.

    Raises:
        DatasetError: The haystack is missing or shorter than the longest length.
        ConfigError: A length does not fit the window.
    """
    lengths = settings.lengths or _LENGTHS
    longest = check_lengths(backbone, lengths)
    hay = haystack_text(settings)
    cases = []
    for index in range(settings.n_needles):
        draw = random.Random(f"{settings.seed}:{index}")
        sentence, query = _needle(draw)
        around = part_of(backbone, hay, longest, draw)
        for length in lengths:
            for depth in settings.depths:
                n_hay = max(1, length - len(backbone.encode_text(f" {sentence} ")))
                text = with_needle(cut(backbone, around, n_hay), sentence, depth=depth)
                name = f"needle:{length}:{depth:g}:{settings.seed}:{index}"
                cases.append(Case(id=name, text=text, queries=(query,), cell=(length, depth)))
    return cases


def check_lengths(backbone: Backbone, lengths: Sequence[int]) -> int:
    """The longest of these lengths; a ConfigError if it does not fit the window."""
    longest = max(lengths)
    if longest > (window := room_for_document(backbone)):
        raise ConfigError(
            f"a haystack of {longest:,} tokens leaves no room for question and answer in a window of "
            f"{backbone.context_window:,}",
            where="lengths",
            next_step=f"Set lengths to {window} or less." if window >= 32 else "Use a model with a longer window.",
        )
    return longest


def haystack_text(settings: TaskSettings) -> str:
    """All essays as one text; a DatasetError without essays."""
    source, data = settings.haystack, data_folder(settings.data)
    if source is None:
        if data is None or not (data / "needle").is_dir():
            raise DatasetError(
                "no haystack is given",
                where="KV_MEMORY_DATA" if data is None else str(data / "needle"),
                next_step="Set haystack to a folder or archive of texts, or name a data folder that has needle/.",
            )
        source = min((data / "needle").glob("*.tar.gz"), default=data / "needle")
    return "\n\n".join(example.context for example in read_examples(source))


def _needle(draw: random.Random) -> tuple[str, Query]:
    sentence, question = draw.choice(_NEEDLES)
    words = {"place": draw.choice(_PLACES), "thing": draw.choice(_THINGS)}
    number = str(draw.randrange(1000, 10000))
    query = Query(text=question.format(**words), references=(number,))
    return sentence.format(**words, number=number), query


def part_of(backbone: Backbone, hay: str, n_tokens: int, draw: random.Random) -> str:
    """A part that begins with a sentence and has at least `n_tokens`; a DatasetError if the haystack is shorter."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(hay))]
    for start in (draw.choice(starts), 0):
        part = hay[start : start + 12 * n_tokens + 1000]  # in characters; a token of prose has four or five
        if backbone.count_tokens([part])[0] >= n_tokens:
            return part
    raise DatasetError(
        f"the haystack is shorter than {n_tokens:,} tokens", where="haystack", next_step="Set haystack to a longer one."
    )


def with_needle(hay: str, needle: str, *, depth: float) -> str:
    """Insert a sentence between two sentences of a text, as close as possible to a depth in [0, 1]."""
    wanted = depth * len(hay)
    borders = [0, *(match.start() for match in SENTENCE_END.finditer(hay)), len(hay)]
    at = min(borders, key=lambda border: abs(border - wanted))
    return f"{hay[:at].rstrip()} {needle} {hay[at:].lstrip()}".strip()
