"""Bench: one document, the full cache's answers about it, and any other reading measured against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from asking import ROOT, Asking, extend
from opening import FirstToken
from reader import Reader, Reading

__all__ = ["Answered", "Bench"]


@dataclass(frozen=True)
class Answered:
    """One question.

    Attributes:
        kl: KL(full || reading) in nats, mean over the tokens of the full cache's own answer.
        nll: Mean negative log-likelihood per token of the first reference, in nats.
        text: The greedy answer; None if none was wanted.
    """

    kl: float
    nll: float
    text: str | None


@dataclass(frozen=True)
class _Scored:
    """All questions about one reading, before decoding.

    Attributes:
        asking: The tree with the questions in it.
        behind: For each question, the token after which each token of the full cache's answer was predicted.
        best: Tokens that greedy decoding picks there.
        kl: KL for each question, see `Answered`.
        nll: NLL for each question, see `Answered`.
    """

    asking: Asking
    behind: list[list[int]]
    best: list[list[int]]
    kl: list[float]
    nll: list[float]


class Bench:
    """Questions about one document.

    Args:
        reader: Reader whose model answers.
        text: Token ids of prefix and document.
        questions: Questions of one line of the work file.
        stop: Strings that end an answer.
        end_ids: Tokens that end an answer.
        max_new_tokens: Length limit of an answer; 0 for no answers.
    """

    def __init__(
        self,
        reader: Reader,
        text: Sequence[int],
        questions: Sequence[dict[str, Any]],
        *,
        stop: Sequence[str],
        end_ids: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self._reader, self._questions = reader, questions
        self._stop, self._end_ids, self._max_new_tokens = stop, set(end_ids), max_new_tokens
        reader.warm_up(text)
        self.full = reader.read(text)
        self._openings = [
            FirstToken(reader.tokenizer, end_ids=self._end_ids, behind=question["ids"][-1]) for question in questions
        ]
        self._teacher: Sequence[torch.Tensor] = ()  # log-probabilities at the full cache's answer
        self._scored_full = self._score(self.full)

    def measure(self, readings: Sequence[Reading]) -> list[list[Answered]]:
        """Measures of every question for each reading."""
        scored = [self._scored_full if reading is self.full else self._score(reading) for reading in readings]
        texts = self._decode(scored) if self._max_new_tokens else [[None] * len(self._questions) for _ in readings]
        return [
            [Answered(kl, nll, text) for kl, nll, text in zip(one.kl, one.nll, row, strict=True)]
            for one, row in zip(scored, texts, strict=True)
        ]

    def _score(self, reading: Reading) -> _Scored:
        """The measures that need no decoding. The first reading scored is the full cache, the teacher of the others."""
        asking = Asking(self._reader, reading)
        tokens: list[tuple[int, int]] = []
        spans: list[tuple[list[int], list[int]]] = []
        for question in self._questions:
            tokens += asking.chain(ROOT, question["ids"], offset=len(tokens))
            last = len(tokens) - 1
            behind = []
            for ids in (question["teacher_ids"], question["reference_ids"]):
                behind.append([last, *range(len(tokens), len(tokens) + len(ids) - 1)])
                tokens += asking.chain(last, ids[:-1], offset=len(tokens))
            spans.append((behind[0], behind[1]))
        (hidden,) = extend([(asking, tokens)])
        rows = [row for pair in spans for row in pair]
        log_probs = self._reader.log_probs(hidden[[at for row in rows for at in row]]).split([len(row) for row in rows])
        said, references = log_probs[::2], log_probs[1::2]
        self._teacher = self._teacher or said
        return _Scored(
            asking=asking,
            behind=[answer for answer, _ in spans],
            best=[self._follow(index, rows) for index, rows in enumerate(said)],
            kl=[kl(taught, here) for taught, here in zip(self._teacher, said, strict=True)],
            nll=[nll(rows, one["reference_ids"]) for rows, one in zip(references, self._questions, strict=True)],
        )

    def _decode(self, scored: Sequence[_Scored]) -> list[list[str]]:
        """Greedy answers of all readings together.

        As far as a reading's most likely tokens equal the full cache's, they have been prefilled already; decoding
        continues from the first that differs.
        """
        answers: list[list[list[int]]] = [[] for _ in scored]
        heads: dict[tuple[int, int], int] = {}  # of each unfinished answer, the token behind which its last one stands
        for index, one in enumerate(scored):
            for row, (best, behind, question) in enumerate(zip(one.best, one.behind, self._questions, strict=True)):
                taught = question["teacher_ids"]
                n_same = next((i for i, (a, b) in enumerate(zip(best, taught, strict=True)) if a != b), len(taught))
                answers[index].append([*taught[:n_same], *best[n_same : n_same + 1]])
                if n_same < len(taught) and not self._ended(answers[index][row]):
                    heads[index, row] = behind[n_same]
        while heads:
            groups: dict[int, list[int]] = {}
            for index, row in heads:
                groups.setdefault(index, []).append(row)
            first = {index: scored[index].asking.n_tokens for index in groups}
            hidden = extend(
                [
                    (scored[index].asking, [(heads[index, row], answers[index][row][-1]) for row in rows])
                    for index, rows in groups.items()
                ]
            )
            rows_left = iter(self._reader.log_probs(torch.cat(hidden)))
            heads = {}
            for index, rows in groups.items():
                for place, row in enumerate(rows):
                    answer = answers[index][row]
                    answer.append(self._pick(row, next(rows_left), answer))
                    if not self._ended(answer):
                        heads[index, row] = first[index] + place
        return [[self._reader.text(answer, stop=self._stop) for answer in rows] for rows in answers]

    def _follow(self, index: int, log_probs: torch.Tensor) -> list[int]:
        """What greedy decoding picks at each token of the full cache's answer."""
        best: list[int] = log_probs.argmax(-1).tolist()
        taught = self._questions[index]["teacher_ids"]
        for step in range(len(taught)):
            if self._openings[index].has_begun(taught[:step]):
                break
            best[step] = self._pick(index, log_probs[step], taught[:step])
        return best

    def _pick(self, index: int, log_probs: torch.Tensor, answer: Sequence[int]) -> int:
        return self._openings[index].pick(log_probs, answer, is_last=len(answer) + 1 == self._max_new_tokens)

    def _ended(self, answer: Sequence[int]) -> bool:
        if len(answer) >= self._max_new_tokens or answer[-1] in self._end_ids:
            return True
        return self._reader.is_stopped(answer, stop=self._stop)


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KL(teacher || student) in nats, the mean over tokens; `(n_tokens, vocab_size)` log-probabilities each."""
    return max(0.0, float((teacher.exp() * (teacher - student)).sum(-1).mean()))


def nll(log_probs: torch.Tensor, ids: Sequence[int]) -> float:
    """Negative log-likelihood in nats, the mean over tokens."""
    wanted = torch.tensor(list(ids), device=log_probs.device)[:, None]
    return -float(log_probs.gather(1, wanted).mean())
