"""RULER's synthetic tasks, by our own generator after the published description (arXiv 2404.06654).

| kind | in the document | expected answer |
|---|---|---|
| `single` | one key with a number, among essays | the number |
| `multi_key` | four keys with a number each | the number of one key |
| `multi_value` | one key with four numbers | all four numbers |
| `multi_query` | four keys with a number each | all four numbers |
| `variable_tracking` | a chain of five assignments, in noise | the variables with its value |
| `common_words` | a list with ten frequent words, all others rare | the ten words |
| `frequent_words` | made-up words, drawn from a Zeta distribution | the three most frequent |

As in the paper, the answer's first words are given, and the score is the share of expected strings that the answer
contains. The differences: lengths are in the model's tokens, without question and answer. Keys and words come from the
essays. No worked example precedes the text. The document is compressed before the question is known: the instruction
before the text is compressed with it, and the question after it comes later.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.cases import Case, Query
from kv_memory.evaluate.tasks.needle import SENTENCE_END, check_lengths, haystack_text, part_of
from kv_memory.evaluate.tasks.task import RulerKind, TaskSettings, cut
from kv_memory.model.backbone import Backbone

_LENGTHS = (1024, 2048)
_N_NEEDLES = 4
_N_HOPS = 4
_N_COMMON = 10
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_LONG = 4096  # tokens: from this length on common words occur 30 times and others 3 times, below it 6 times and once
_ZETA = 1.6449340668482264  # zeta(2); 2 is the exponent of the frequent words
_LEAST_DRAWN = 83  # words: from here on the first five ranks occur 50, 12, 5, 3 and 2 times, without ties
_DOTS = "...."  # replaces the most frequent word, which is noise


@dataclass(frozen=True)
class _Maker:
    """The ingredients of a document: the model that counts tokens, essays, their words, a length, and randomness."""

    kind: RulerKind
    backbone: Backbone
    hay: str
    words: Sequence[str]
    length: int
    draw: random.Random

    def count(self, text: str) -> int:
        return self.backbone.count_tokens([text])[0]

    def filled(self, make: Callable[[int], str], least: int, most: int) -> str:
        """`make(n)` for the largest n from `least` to `most` that fits the length; a ConfigError if none does."""
        low, high = least - 1, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(make(middle)) <= self.length else (low, middle - 1)
        if low < least:
            raise ConfigError(
                f"{self.length:,} tokens are too few for {self.kind}",
                where="lengths",
                next_step="Set lengths to a larger number.",
            )
        return make(low)


def ruler_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """`n_documents` of every kind and length, each with one question; the same for the same seed and tokenizer.

    Raises:
        DatasetError: The haystack is missing or too short.
        ConfigError: A length does not fit the window, or is too small for a kind.
    """
    lengths = settings.lengths or _LENGTHS
    check_lengths(backbone, lengths)
    hay = haystack_text(settings)
    words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", hay)))
    cases = []
    # One of each at a time, so that a run ended by its time limit covers all kinds and lengths.
    for index, length, kind in itertools.product(
        range(settings.n_documents), lengths, settings.kinds or get_args(RulerKind)
    ):
        name = f"ruler:{kind}:{length}:{settings.seed}:{index}"
        maker = _Maker(kind, backbone, hay, words, length, random.Random(name))
        text, query = _MAKERS[kind](maker)
        cases.append(Case(id=name, text=text, queries=(query,), group={"length": length, "kind": kind}))
    return cases


def _asked(question: str, given: str, references: Sequence[str]) -> Query:
    return Query(text=question, given=given, references=tuple(references), all_wanted=True)


# -- needles -----------------------------------------------------------------------------------------------------


def _one_number(maker: _Maker, *, n_keys: int) -> tuple[str, Query]:
    keys, numbers = _keys(maker, n_keys), _numbers(maker, n_keys)
    asked = maker.draw.randrange(n_keys)
    query = _asked(
        f"What is the special magic number for {keys[asked]} mentioned in the text?",
        f"The special magic number for {keys[asked]} mentioned in the text is",
        [numbers[asked]],
    )
    return _hidden(maker, keys, numbers), query


def _multi_value(maker: _Maker) -> tuple[str, Query]:
    (key,), numbers = _keys(maker, 1), _numbers(maker, _N_NEEDLES)
    return _hidden(maker, [key] * _N_NEEDLES, numbers), _all_numbers(key, numbers)


def _multi_query(maker: _Maker) -> tuple[str, Query]:
    keys, numbers = _keys(maker, _N_NEEDLES), _numbers(maker, _N_NEEDLES)
    order = maker.draw.sample(range(_N_NEEDLES), _N_NEEDLES)
    named = f"{', '.join(keys[i] for i in order[:-1])} and {keys[order[-1]]}"
    return _hidden(maker, keys, numbers), _all_numbers(named, [numbers[i] for i in order])


def _all_numbers(named: str, numbers: Sequence[str]) -> Query:
    return _asked(
        f"What are all the special magic numbers for {named} mentioned in the text?",
        f"The special magic numbers for {named} mentioned in the text are",
        numbers,
    )


def _keys(maker: _Maker, n: int) -> list[str]:
    if 2 * n > len(maker.words):
        raise _too_few_words(maker, 2 * n)
    words = maker.draw.sample(maker.words, 2 * n)
    return [f"{first}-{second}" for first, second in zip(words[:n], words[n:], strict=True)]


def _numbers(maker: _Maker, n: int) -> list[str]:
    return [str(number) for number in maker.draw.sample(range(1_000_000, 10_000_000), n)]


def _too_few_words(maker: _Maker, n: int) -> DatasetError:
    return DatasetError(
        f"the haystack has {len(maker.words)} different words of 5 to 9 letters, about {n} are needed",
        where="haystack",
        next_step="Set haystack to a longer one.",
    )


def _hidden(maker: _Maker, keys: Sequence[str], numbers: Sequence[str]) -> str:
    """Essays, with one sentence for each key and number between their sentences."""
    head = (
        "Some special magic numbers are hidden within the following text. Memorize them. You will be asked about the "
        "numbers afterwards.\n"
    )
    needles = [f"One of the special magic numbers for {k} is: {n}." for k, n in zip(keys, numbers, strict=True)]
    n_hay = max(1, maker.length - maker.count(f"{head}{' '.join(needles)} "))
    around = cut(maker.backbone, part_of(maker.backbone, maker.hay, n_hay, maker.draw), n_hay)
    return head + " ".join(_scattered(SENTENCE_END.split(around), needles, maker.draw))


def _scattered(units: Sequence[str], needles: Sequence[str], draw: random.Random) -> list[str]:
    """Units with the needles inserted at random places, in their order."""
    places = sorted(draw.choices(range(len(units) + 1), k=len(needles)))
    mixed = list(units)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        mixed.insert(place, needle)
    return mixed


# -- tracing and counting ----------------------------------------------------------------------------------------


def _made_up(draw: random.Random, n: int, letters: str, *, k: int) -> list[str]:
    """Different words of `k` random letters."""
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(draw.choices(letters, k=k))] = None
    return list(words)


def _variable_tracking(maker: _Maker) -> tuple[str, Query]:
    draw = maker.draw
    names = _made_up(draw, _N_HOPS + 1, string.ascii_uppercase, k=5)
    value = str(draw.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    seed = draw.random()

    def make(n_noise: int) -> str:
        lines = _scattered([_NOISE] * n_noise, chain, random.Random(seed))
        return "Memorize and track the chain of variable assignments hidden in the following text.\n" + "\n".join(lines)

    query = _asked(
        f"Which variables are assigned the value {value} in the text, directly or through other variables?",
        f"By the chain of assignments in the text, {len(names)} variables are assigned the value {value}, they are:",
        names,
    )
    return maker.filled(make, 1, maker.length), query


def _common_words(maker: _Maker) -> tuple[str, Query]:
    often, seldom = (30, 3) if maker.length >= _LONG else (6, 1)
    words = maker.draw.sample(maker.words, min(len(maker.words), _N_COMMON + maker.length))
    common, others = words[:_N_COMMON], words[_N_COMMON:]
    seed = maker.draw.random()

    def make(n_others: int) -> str:
        drawn = [*common * often, *others[:n_others] * seldom]
        random.Random(seed).shuffle(drawn)
        items = " ".join(f"{number}. {word}" for number, word in enumerate(drawn, 1))
        return (
            "Below is a numbered list of words. Some of them appear more often than others. Memorize the ones that "
            f"appear most often.\n{items}"
        )

    if maker.count(make(len(others))) < maker.length:
        raise _too_few_words(maker, n=maker.length // 4)
    query = _asked(
        f"What are the {_N_COMMON} most common words in the list?",
        f"The {_N_COMMON} words that appear most often in the list are:",
        sorted(common),
    )
    return maker.filled(make, 1, len(others)), query


def _frequent_words(maker: _Maker) -> tuple[str, Query]:
    n_ranks = int(maker.length**0.5) + 4  # rank k occurs n / (zeta * k**2) times: at most sqrt(n) ranks
    coded = [_DOTS, *_made_up(maker.draw, n_ranks, string.ascii_lowercase, k=6)[1:]]
    seed = maker.draw.random()

    def make(n: int) -> str:
        drawn = [word for rank, word in enumerate(coded, 1) for _ in range(int(n / _ZETA / rank**2))]
        random.Random(seed).shuffle(drawn)
        return (
            "Read the following coded text and track how often each coded word appears. Find the three most frequent "
            f"coded words.\n{' '.join(drawn)}"
        )

    query = _asked(
        f"Ignore the dots '{_DOTS}'. Which three words appear most often in the coded text?",
        "The three words that appear most often in the coded text are:",
        coded[1:4],
    )
    return maker.filled(make, _LEAST_DRAWN, maker.length), query


_MAKERS: dict[RulerKind, Callable[[_Maker], tuple[str, Query]]] = {
    "single": partial(_one_number, n_keys=1),
    "multi_key": partial(_one_number, n_keys=_N_NEEDLES),
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
