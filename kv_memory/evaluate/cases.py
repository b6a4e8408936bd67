"""Cases: the documents of a task and what is asked about each; how they are chosen, filtered and cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from kv_memory.datasets import Example
from kv_memory.errors import DatasetError
from kv_memory.model.backbone import Backbone

__all__ = ["ROOM_TOKENS", "Case", "EncodedQuery", "Group", "Query", "choose", "cut", "encode_query", "in_hash_order"]

Group = dict[str, int | str]

ROOM_TOKENS = 1024  # left in the window for a question with its answer, and for a selector's own request


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question about a document.

    Attributes:
        text: As it is asked, without the prompt form's wrapper.
        references: What is right; at least one.
        all_wanted: Whether all references are wanted, and not any one of them.
        given: Words that the answer begins with; they are prefilled and not measured.
        choices: Of a multiple choice question; empty otherwise.
        correct: Index of the right choice.
        span: Where given words and reference lie in the document, in characters; None where they are not from it.
    """

    text: str
    references: tuple[str, ...]
    given: str = ""
    span: tuple[int, int] | None = None
    choices: tuple[str, ...] = ()
    correct: int | None = None
    all_wanted: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One document, or several that are read together, and what is asked about it.

    Attributes:
        id: The example's id, by which tables of several methods, our own and others', are paired.
        text: The document; of several, the one that the questions are about.
        queries: At least one.
        cell: Length in tokens and depth in [0, 1] of a needle; None for other tasks.
        passages: All documents in the order they are read, `text` among them; empty where it is the only one.
        group: What sets cases of one id, or kinds of cases, apart in tables, e.g. `{"k": 3, "place": 1}`.
    """

    id: str
    text: str
    queries: tuple[Query, ...]
    cell: tuple[int, float] | None = None
    passages: tuple[str, ...] = ()
    group: Group = field(default_factory=dict)

    @property
    def documents(self) -> tuple[str, ...]:
        """All documents in the order they are read."""
        return self.passages or (self.text,)

    @property
    def digest(self) -> str:
        """SHA-256 over the documents and everything asked about them."""
        data = asdict(self)
        # What came later is left out where it is not used, so that what was measured before still counts.
        for name in ("passages", "group"):
            if not data[name]:
                del data[name]
        for query in data["queries"]:
            if not query["all_wanted"]:
                del query["all_wanted"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodedQuery:
    """Token ids of a query.

    Attributes:
        prompt: The question in its wrapper, and the given words.
        reference: The first reference, or a list of all where all are wanted.
        choices: Each choice.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def encode_query(backbone: Backbone, query: Query) -> EncodedQuery:
    """Token ids of a query. Answers begin with a space where the prompt form does not end with white space.

    Without it `Answer:` would be followed by a token that the model never wrote there, and the likelihood of every
    reference would say more about that than about the document.
    """
    after = backbone.prompt.question_after
    lead = "" if not after or after[-1].isspace() else " "
    prompt = backbone.encode_question(query.text)
    right = f" {', '.join(query.references)}" if query.all_wanted else query.references[0]
    if query.given:
        prompt += backbone.encode_text(lead + query.given)
        reference = backbone.encode_text(right)  # goes on where the given words end
    else:
        reference = backbone.encode_text(lead + right.strip())
    choices = tuple(tuple(backbone.encode_text(lead + choice.strip())) for choice in query.choices)
    return EncodedQuery(prompt=tuple(prompt), reference=tuple(reference), choices=choices)


def in_hash_order(examples: Iterable[Example]) -> list[Example]:
    """Examples ordered by the SHA-256 of their ids: the first N are a sample that anybody can draw again.

    A document that occurs twice, which has the same id, is taken once.
    """
    unique: dict[str, Example] = {}
    for example in examples:
        unique.setdefault(example.id, example)
    return sorted(unique.values(), key=lambda example: hashlib.sha256(example.id.encode()).hexdigest())


def choose(
    examples: Iterable[Example],
    backbone: Backbone,
    *,
    n_documents: int,
    min_tokens: int,
    max_tokens: int,
    cut_long: bool = False,
    what: str,
) -> list[Example]:
    """The first documents of a fitting length.

    Args:
        examples: In the order of choice.
        backbone: Whose tokens are counted.
        n_documents: How many, at most.
        min_tokens: Shorter ones are left out.
        max_tokens: Longer ones are left out, or cut.
        cut_long: Cut them.
        what: The set's name, for the error.

    Raises:
        DatasetError: There is none.
    """
    chosen = list(_fitting(examples, backbone, n_documents, min_tokens, max_tokens, cut_long))
    if not chosen:
        raise DatasetError(
            f"no document of {min_tokens:,} to {max_tokens:,} tokens with questions",
            where=what,
            next_step="Change --min-tokens and --max-tokens, or choose another set.",
        )
    return chosen


def _fitting(
    examples: Iterable[Example], backbone: Backbone, n_documents: int, least: int, most: int, cut_long: bool
) -> Iterator[Example]:
    found = 0
    for example in examples:
        if found == n_documents:
            return
        (n_tokens,) = backbone.count_tokens([example.context])
        if n_tokens < least or (n_tokens > most and not cut_long):
            continue
        found += 1
        yield replace(example, context=cut(backbone, example.context, most)) if n_tokens > most else example


def cut(backbone: Backbone, text: str, n_tokens: int) -> str:
    """The beginning of a text, of at most so many tokens."""
    offsets = backbone.encode_with_offsets(text)[1]
    return text if len(offsets) <= n_tokens else text[: offsets[n_tokens - 1][1]].rstrip()
