"""Cases: documents of a task and the questions about them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from kv_memory.model.backbone import Backbone

Group = dict[str, int | str]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question about a document.

    Attributes:
        text: The question, without the prompt form's wrapper.
        references: Correct answers, at least one.
        all_wanted: True if all references are required, False if any one of them is enough.
        given: Words that the answer begins with; they are prefilled and not measured.
        choices: Choices of a multiple choice question, with the index `correct`; empty otherwise.
        span: Character span of given words and reference in the document; None if they are not from it.
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
    """One document, or several that are used together, and the questions about it.

    Attributes:
        id: Id of the example; tables of several methods, our own and others', are paired by it.
        text: The document; of several, the one that the questions are about.
        queries: Questions, at least one.
        cell: Length in tokens and depth in [0, 1] of a needle; None for other tasks.
        passages: All documents in the order of their positions, including `text`; empty if it is the only one.
        group: Properties that distinguish cases with the same id, or kinds of cases, in tables, e.g.
            `{"k": 3, "place": 1}`.
    """

    id: str
    text: str
    queries: tuple[Query, ...]
    cell: tuple[int, float] | None = None
    passages: tuple[str, ...] = ()
    group: Group = field(default_factory=dict)

    @property
    def documents(self) -> tuple[str, ...]:
        """All documents in the order of their positions."""
        return self.passages or (self.text,)

    @property
    def digest(self) -> str:
        """SHA-256 over the documents and their questions."""
        data = asdict(self)
        # Fields added later are omitted if unused, so that the digests of earlier measurements stay valid.
        for fields in (data, *data["queries"]):
            for name in {"passages", "group", "all_wanted"} & fields.keys():
                if not fields[name]:
                    del fields[name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class EncodedQuery(NamedTuple):
    """Token ids of the question in its wrapper with the given words, of the reference, and of each choice.

    The reference is the first one, or a list of all of them if all are required.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def encode_query(backbone: Backbone, query: Query) -> EncodedQuery:
    """Token ids of a query. Answers begin with a space if the prompt form does not end in white space.

    Without the space, `Answer:` would be followed by a token that the model never produces there, and the likelihood
    of every reference would measure that instead of the document.
    """
    after = backbone.prompt.question_after
    lead = "" if not after or after[-1].isspace() else " "
    prompt = backbone.encode_question(query.text)
    right = f" {', '.join(query.references)}" if query.all_wanted else query.references[0]
    if query.given:
        prompt += backbone.encode_text(lead + query.given)
        reference = backbone.encode_text(right)  # continues the given words
    else:
        reference = backbone.encode_text(lead + right.strip())
    choices = tuple(tuple(backbone.encode_text(lead + choice.strip())) for choice in query.choices)
    return EncodedQuery(tuple(prompt), tuple(reference), choices)
