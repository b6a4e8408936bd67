"""Domain tuning: an adapter for one corpus, which makes far smaller keep ratios usable for it (KV-Distill, 4.5).

Pages are cut into windows as long as the documents that will be compressed, and windows into passages short enough for
good questions from the model. A window is trained on with the questions about all its passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kv_memory.datasets import Example, Question, corpus_split
from kv_memory.documents import split_passages
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import TrainSettings

__all__ = ["Corpus", "Window", "cut_corpus", "domain_settings"]

PASSAGE_TOKENS = 256
WINDOW_TOKENS = 1500

# Differences from training on question data sets: keep ratios down to 1/200, long documents, more spans.
_DOMAIN = {"min_ratio": 0.005, "max_ratio": 0.3, "max_tokens": WINDOW_TOKENS + 36, "spans_per_document": 3}


@dataclass(frozen=True)
class Window:
    """A section of a page and its passages.

    Attributes:
        example: Text of the window, without questions.
        passages: Passages of the window, in order.
    """

    example: Example
    passages: tuple[str, ...]

    def examples(self, questions: Sequence[Sequence[Question]]) -> list[Example]:
        """The window with all questions; if it has several passages, also each passage with its own questions.

        Args:
            questions: Questions about each passage.
        """
        whole = replace(self.example, questions=tuple(question for part in questions for question in part))
        if len(self.passages) == 1:
            return [whole]
        parts = [
            replace(self.example, id=f"{self.example.id}/{number}", context=passage, questions=tuple(asked))
            for number, (passage, asked) in enumerate(zip(self.passages, questions, strict=True))
        ]
        return [whole, *parts]


@dataclass(frozen=True)
class Corpus:
    """A corpus cut into windows.

    Attributes:
        train: Windows to train on.
        held_out: Windows of the held-out pages.
        held_out_ids: Ids of the held-out pages.
    """

    train: tuple[Window, ...]
    held_out: tuple[Window, ...]
    held_out_ids: tuple[str, ...]

    @property
    def passages(self) -> list[str]:
        """All passages to train on, in order."""
        return [passage for window in self.train for passage in window.passages]


def domain_settings(settings: TrainSettings, *, given: Sequence[str] = ()) -> TrainSettings:
    """Settings for domain tuning; explicitly chosen ones are not changed.

    Args:
        settings: Settings of a preset, with the user's changes.
        given: Names of the settings that the user chose explicitly.
    """
    changes = {name: value for name, value in _DOMAIN.items() if name not in given}
    if "min_ratio" in given:
        changes.pop("max_ratio", None)  # the given min_ratio may be above our max_ratio
    if "max_ratio" in given and settings.max_ratio < _DOMAIN["min_ratio"]:
        changes["min_ratio"] = settings.max_ratio
    return replace(settings, **changes)  # type: ignore[arg-type]


def cut_corpus(
    pages: Sequence[Example],
    backbone: Backbone,
    *,
    held_out: float = 0.2,
    window_tokens: int = WINDOW_TOKENS,
    passage_tokens: int = PASSAGE_TOKENS,
) -> Corpus:
    """Hold out pages by the hash of their ids, and cut all pages into windows and passages.

    Args:
        pages: Pages from `read_examples`; their questions, if any, are ignored.
        backbone: Backbone with the tokenizer for counting, and the context window that limits the windows.
        held_out: Share of the pages to hold out; 0 holds out no page.
        window_tokens: Longest window, in tokens.
        passage_tokens: Longest passage, in tokens.

    Raises:
        DatasetError: There are no pages.
        ConfigError: A length is below 16 tokens, or passages are longer than windows.
    """
    if not pages:
        raise DatasetError("the corpus has no pages", next_step="Pass a folder with text or Markdown files.")
    if not 16 <= passage_tokens <= window_tokens:
        raise ConfigError(
            f"passages of {passage_tokens} tokens in windows of {window_tokens} tokens: passages must have at least 16 "
            "tokens, and windows at least as many as passages",
            where="passage_tokens",
        )
    most = backbone.context_window - len(backbone.prefix_ids) - 256  # room for questions and answers
    window_tokens = min(window_tokens, max(passage_tokens, most))
    train, kept_out = corpus_split(pages, held_out) if held_out else (list(pages), [])
    if not train:  # e.g. a single page
        train, kept_out = kept_out, []
    cut: Callable[[str, int], list[str]] = lambda text, n: split_passages(  # noqa: E731
        text, max_tokens=n, count_tokens=backbone.count_tokens
    )

    def windows(page: Example) -> list[Window]:
        return [
            Window(
                example=replace(page, id=f"{page.id}#{number}", context=text, questions=()),
                passages=tuple(cut(text, passage_tokens)),
            )
            for number, text in enumerate(cut(page.context, window_tokens))
        ]

    return Corpus(
        train=tuple(window for page in train for window in windows(page)),
        held_out=tuple(window for page in kept_out for window in windows(page)),
        held_out_ids=tuple(page.id for page in kept_out),
    )
