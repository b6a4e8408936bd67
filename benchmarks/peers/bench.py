"""Bench: one document, what the full cache says about it, and any other reading measured against that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from asking import ROOT, Asking
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


class Bench:
    """Questions about one document.

    Args:
        reader: Whose model answers.
        text: Token ids of prefix and document.
        questions: Of a line of the file of work.
        stop: Strings that end an answer.
        end_ids: Tokens that do.
        max_new_tokens: The longest answer; 0 for none.
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
        reader.read(text)  # the first reading of a length pays for what the second finds ready
        self.full = reader.read(text)
        self._teacher: list[torch.Tensor] = []  # log-probabilities at the full cache's answer
        _, self._teacher, _, _ = self._score(self.full)

    def measure(self, reading: Reading) -> list[Answered]:
        """What a reading makes of every question."""
        asking, said, references, nodes = self._score(reading)
        texts = self._decode(asking, said, nodes) if self._max_new_tokens else [None] * len(said)
        return [
            Answered(kl(taught, here), nll(reference, question["reference_ids"]), text)
            for taught, here, reference, question, text in zip(
                self._teacher, said, references, self._questions, texts, strict=True
            )
        ]

    def _score(self, reading: Reading) -> tuple[Asking, list[torch.Tensor], list[torch.Tensor], list[list[int]]]:
        """Log-probabilities at the full cache's answers and at the references.

        Returns also, per question, the token behind which each token of the full cache's answer was predicted.
        """
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
        hidden = asking.extend(tokens)
        said = [asking.log_probs(hidden[answer]) for answer, _ in spans]
        references = [asking.log_probs(hidden[reference]) for _, reference in spans]
        return asking, said, references, [answer for answer, _ in spans]

    def _decode(self, asking: Asking, said: Sequence[torch.Tensor], nodes: Sequence[Sequence[int]]) -> list[str]:
        """Greedy answers.

        As far as a reading's likeliest tokens are the full cache's, they have been read already; decoding goes on
        from the first that differs.
        """
        answers: list[list[int]] = []
        heads: dict[int, int] = {}  # of each unfinished answer, the token behind which its last one stands
        for row, (log_probs, behind, question) in enumerate(zip(said, nodes, self._questions, strict=True)):
            best, taught = log_probs.argmax(-1).tolist(), question["teacher_ids"]
            n_same = next((i for i, (a, b) in enumerate(zip(best, taught, strict=True)) if a != b), len(taught))
            answers.append([*taught[:n_same], *best[n_same : n_same + 1]])
            if n_same < len(taught) and not self._ended(answers[row]):
                heads[row] = behind[n_same]
        count = asking.n_tokens
        while heads:
            hidden = asking.extend([(parent, answers[row][-1]) for row, parent in heads.items()])
            best = asking.log_probs(hidden).argmax(-1).tolist()
            heads = {row: count + i for i, row in enumerate(heads)}
            count = asking.n_tokens
            for row, token in zip(list(heads), best, strict=True):
                answers[row].append(token)
                if self._ended(answers[row]):
                    del heads[row]
        return [self._reader.text(answer, stop=self._stop) for answer in answers]

    def _ended(self, answer: Sequence[int]) -> bool:
        if len(answer) >= self._max_new_tokens or answer[-1] in self._end_ids:
            return True
        text = self._reader.tokenizer.decode(list(answer), skip_special_tokens=True)
        return any(word in text for word in self._stop)


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KL(teacher || student) in nats, the mean over tokens; `(n_tokens, vocab_size)` log-probabilities each."""
    return max(0.0, float((teacher.exp() * (teacher - student)).sum(-1).mean()))


def nll(log_probs: torch.Tensor, ids: Sequence[int]) -> float:
    """Negative log-likelihood in nats, the mean over tokens."""
    wanted = torch.tensor(list(ids), device=log_probs.device)[:, None]
    return -float(log_probs.gather(1, wanted).mean())
