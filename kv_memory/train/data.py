"""Training examples of a run: shares of several data sets, with some documents held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kv_memory.datasets import Example, read_examples, sample
from kv_memory.errors import ConfigError

__all__ = ["LICENCES", "Source", "hold_out", "parse_source", "read_sources"]

_SHARE = re.compile(r"(?P<name>.+):(?P<share>\d+(\.\d*)?|\.\d+)")

# Licences as stated by the publishers of the known sets; a model card must name them.
LICENCES = {
    "squad": "CC BY-SA 4.0 (text of Wikipedia)",
    "dolly": "CC BY-SA 3.0",
    "fairytaleqa": "questions: no licence stated with the set; stories: public domain (Project Gutenberg)",
    "squality": "CC BY 4.0; stories: public domain (Project Gutenberg)",
    "quality": "CC BY 4.0; sources of the texts vary",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set to train on.

    Attributes:
        name: Name or path of the set, as for `read_examples`.
        share: Share of its examples; above 1, some or all of them are repeated.

    Raises:
        ConfigError: The share is not in (0, 100].
    """

    name: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 100:
            raise ConfigError(f"a share must lie in (0, 100], got {self.share}", where=self.name)

    def __str__(self) -> str:
        return self.name if self.share == 1 else f"{self.name}:{self.share:g}"


def parse_source(text: str) -> Source:
    """Parse `squad` or `notes/train.jsonl`, or with a share of the examples: `squad:0.5`.

    Raises:
        ConfigError: The share is out of range.
    """
    match = _SHARE.fullmatch(text)
    return Source(name=match["name"], share=float(match["share"])) if match else Source(name=text)


def read_sources(
    sources: Sequence[Source],
    *,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    on_skip: Callable[[str], None] | None = None,
) -> list[Example]:
    """The training examples of all sets, one set after the other.

    Args:
        sources: Data sets to read.
        seed: Random seed of the selection for fractional shares.
        on_error: Handling of broken records, see `read_examples`.
        on_skip: Callback for skipped records, see `read_examples`.

    Raises:
        DatasetError: A set is missing, unreadable or empty; or a record is broken, with `on_error="raise"`.
    """
    found: list[Example] = []
    for source in sources:
        examples = list(read_examples(source.name, split="train", on_error=on_error, on_skip=on_skip))
        whole, rest = divmod(source.share, 1)
        found += examples * int(whole)
        if rest:
            found += sample(examples, max(1, round(rest * len(examples))), seed)
    return found


def hold_out(examples: Sequence[Example], n: int, *, most: float = 0.2) -> tuple[list[Example], list[Example]]:
    """Hold out `n` documents for evaluation: `(training, held out)`.

    The choice depends only on the documents' ids, so it is stable between runs and hardly changes when data are added.

    Args:
        examples: Examples; those with the same id are one document.
        n: Number of documents to hold out.
        most: Largest share of all documents to hold out.
    """
    distinct = {example.id: example for example in examples}
    chosen = sample(distinct.values(), min(n, int(len(distinct) * most)))
    ids = {example.id for example in chosen}
    return [example for example in examples if example.id not in ids], chosen
