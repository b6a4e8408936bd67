"""Training examples of a run: shares of several data sets, or the documents of a corpus, with some held out.

An adapter for one corpus makes far smaller keep ratios usable for it (KV-Distill, 4.5). Pages are cut into windows as
long as the documents that will be compressed, and windows into passages short enough for good questions from the model.
A window is trained on with the questions about all its passages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from kv_memory.datasets import Example, Question, corpus_split, read_examples, sample
from kv_memory.documents import split_passages
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import WINDOW_TOKENS

PASSAGE_TOKENS = 256

# Licences as stated by the publishers of the known sets; a model card must name them.
LICENCES = {
    "squad": "CC BY-SA 4.0 (text of Wikipedia)",
    "dolly": "CC BY-SA 3.0",
    "fairytaleqa": "questions: no licence stated with the set; stories: public domain (Project Gutenberg)",
    "squality": "CC BY 4.0; stories: public domain (Project Gutenberg)",
    "quality": "CC BY 4.0; sources of the texts vary",
}


def split_share(source: str) -> tuple[str, float]:
    """The name of a set, as for `read_examples`, and the share of its examples: 0.5 of `squad:0.5`, else 1.

    Raises:
        ConfigError: The share is not in (0, 100].
    """
    name, _, text = source.rpartition(":")
    try:
        name, share = (name, float(text)) if name else (source, 1.0)
    except ValueError:  # the end of a name
        return source, 1.0
    if not 0 < share <= 100:
        raise ConfigError(f"a share must lie in (0, 100], got {share}", where=name)
    return name, share


def read_sources(
    sources: Sequence[str], *, seed: int = 0, read: Callable[..., Iterable[Example]] = read_examples
) -> list[Example]:
    """The training examples of all sets, one set after the other.

    Each name or path may have a share, see `split_share`. A share above 1 repeats some or all examples; a fractional
    one selects by `seed`.

    Raises:
        ConfigError: A share is out of range.
        DatasetError: A set is missing, unreadable or empty, or a record is broken.
    """
    found: list[Example] = []
    for name, share in map(split_share, sources):
        examples = list(read(name, split="train"))
        whole, rest = divmod(share, 1)
        found += examples * int(whole)
        if rest:
            found += sample(examples, max(1, round(rest * len(examples))), seed)
    return found


def hold_out(examples: Sequence[Example], n: int) -> tuple[list[Example], list[Example]]:
    """Hold out `n` documents (examples with the same id), at most a fifth of all: `(training, held out)`.

    The choice depends only on the documents' ids, so it is stable between runs and hardly changes when data are added.
    """
    distinct = {example.id: example for example in examples}
    chosen = sample(distinct.values(), min(n, len(distinct) // 5))
    ids = {example.id for example in chosen}
    return [example for example in examples if example.id not in ids], chosen


class Window(NamedTuple):
    """A section of a page, without questions, and its passages in order."""

    example: Example
    passages: list[str]

    def examples(self, questions: Sequence[Sequence[Question]]) -> list[Example]:
        """The window with the questions about all passages; if it has several, also each passage with its own."""
        whole = replace(self.example, questions=tuple(question for part in questions for question in part))
        if len(self.passages) == 1:
            return [whole]
        parts = [
            replace(self.example, id=f"{self.example.id}/{number}", context=passage, questions=tuple(asked))
            for number, (passage, asked) in enumerate(zip(self.passages, questions, strict=True))
        ]
        return [whole, *parts]


class Corpus(NamedTuple):
    """A corpus cut into windows: those to train on, those of the held-out pages, and the ids of these pages."""

    train: list[Window]
    held_out: list[Window]
    held_out_ids: list[str]


def cut_corpus(pages: Sequence[Example], backbone: Backbone, *, window_tokens: int = WINDOW_TOKENS) -> Corpus:
    """Hold out a fifth of the pages by the hash of their ids, and cut all pages into windows and passages.

    Questions of the pages are ignored. Windows have at most `window_tokens`, or what the model's context window allows.

    Raises:
        DatasetError: There are no pages.
        ConfigError: Windows would be shorter than 16 tokens.
    """
    if not pages:
        raise DatasetError("the corpus has no pages", next_step="Pass a folder with text or Markdown files.")
    # Questions and answers need room behind a window.
    window_tokens = min(window_tokens, backbone.context_window - len(backbone.prefix_ids) - 256)
    if window_tokens < 16:
        raise ConfigError(
            f"documents of {window_tokens} tokens are too short to ask about",
            where="max_tokens",
            next_step="Raise max_tokens, or use a model with a longer context window.",
        )
    passage_tokens = min(PASSAGE_TOKENS, window_tokens)

    def cut(text: str, n: int) -> list[str]:
        return split_passages(text, max_tokens=n, count_tokens=backbone.count_tokens)

    def windows(pages: Sequence[Example]) -> list[Window]:
        return [
            Window(replace(page, id=f"{page.id}#{number}", context=text, questions=()), cut(text, passage_tokens))
            for page in pages
            for number, text in enumerate(cut(page.context, window_tokens))
        ]

    train, kept_out = corpus_split(pages, 0.2)
    if not train:  # e.g. a single page
        train, kept_out = kept_out, []
    return Corpus(windows(train), windows(kept_out), [page.id for page in kept_out])
