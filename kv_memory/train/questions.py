"""Questions about passages, written and answered by the model itself.

Training on a corpus needs questions about it, and a corpus comes without any. The model prefills a passage, continues
from its full cache in the prompt form (`Question: Who …`), and then answers greedily from the same cache. A small model
repeats itself with free openings, so the first words of the questions are given: they make the questions differ at no
cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

from kv_memory.compress.refine.batching import Row
from kv_memory.compress.refine.teacher import Teacher, stop_ids
from kv_memory.datasets import Question
from kv_memory.errors import DatasetError
from kv_memory.model.backbone import Backbone
from kv_memory.train.json_lines import JsonLines

STEMS = ("What", "How", "Which", "Why", "When", "Where", "Who", "")
_REQUEST = "Write one question that the text above answers{begin}. Write the question only."
QUESTION_TOKENS = 32  # longest question
_TEMPERATURE = 0.3  # of the questions; above 0.5 a small model writes nonsense. Answers are greedy.
_FEWEST_WORDS = 3  # shortest accepted question
_MAX_ENTRIES = 16_384  # most entries copied at once; each question about a passage needs its own copy


@dataclass(frozen=True)
class QuestionWriter:
    """Writes questions and answers, reproducibly for a seed.

    Attributes:
        n_questions: Most questions about a passage; what is no question, has no answer, or is a duplicate is dropped.
        batch_passages: Number of passages prefilled at once.
    """

    backbone: Backbone
    _: KW_ONLY
    n_questions: int = 8
    answer_tokens: int = 48
    seed: int = 0
    batch_passages: int = 1

    def write(
        self, passages: Sequence[str], *, path: Path | None = None, on_passage: Callable[[int, int], None] | None = None
    ) -> list[tuple[Question, ...]]:
        """Questions about each passage, in order; passages are texts without a wrapper, and not blank.

        The file `path`, of JSON lines, stores the questions; passages already in it are not processed again.
        `on_passage` is called with the number of finished passages and the total.

        Raises:
            DatasetError: The file cannot be read or written.
        """
        backbone = self.backbone
        made_by: list[object] = [backbone.weights_sha256, backbone.tokenizer_sha256, backbone.prompt.digest]
        made_by += [self.n_questions, QUESTION_TOKENS, self.answer_tokens, _TEMPERATURE, self.seed]
        keys = [hashlib.sha256(json.dumps([*made_by, passage]).encode()).hexdigest() for passage in passages]
        known: dict[str, list[tuple[str, str]]] = {}
        with _file_errors(path):
            records = [] if path is None else JsonLines(path).records()
        for record in records:
            with suppress(ValueError, TypeError, KeyError):  # a line in another format
                known[str(record["key"])] = [(str(q), str(a)) for q, a in record["questions"]]
        todo = [index for index, key in enumerate(keys) if key not in known]
        for first in range(0, len(todo), self.batch_passages):
            part = todo[first : first + self.batch_passages]
            written = self._write([passages[index] for index in part])
            fresh = {keys[index]: pairs for index, pairs in zip(part, written, strict=True)}
            known |= fresh
            with _file_errors(path):
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    JsonLines(path).append(*({"key": key, "questions": pairs} for key, pairs in fresh.items()))
            if on_passage is not None:
                on_passage(len(passages) - len(todo) + first + len(part), len(passages))
        return [tuple(Question(text=q, answers=(a,)) for q, a in known[key]) for key in keys]

    def _write(self, passages: Sequence[str]) -> list[list[tuple[str, str]]]:
        backbone = self.backbone
        # 1. Prefill the passages, with room for the longest question, its wrapper or opening, and the longest answer.
        documents = [backbone.encode_document(passage) for passage in passages]
        stems = [STEMS[number % len(STEMS)] for number in range(self.n_questions)]
        asked = [(number, stem) for number in range(len(passages)) for stem in stems]
        openings = [self._opening(number, stem) for number, stem in asked]
        room = max(len(row.ids) for row in openings) + QUESTION_TOKENS
        room = max(room, len(backbone.encode_question(""))) + QUESTION_TOKENS + self.answer_tokens
        teacher = Teacher(backbone, documents, room=room, max_entries=_MAX_ENTRIES)
        # 2. Sample the questions.
        tokens = teacher.decode(
            openings,
            most=QUESTION_TOKENS,
            ends=self._question_ends,
            temperature=_TEMPERATURE,
            # A passage gets the same questions in any batch.
            seeds=[
                _number(f"{self.seed}:{index % self.n_questions}:{passages[number]}")
                for index, (number, _) in enumerate(asked)
            ],
        )
        # 3. Drop texts that are not questions, and duplicates.
        questions: list[tuple[int, str]] = []
        for (number, stem), text in zip(asked, self._texts(tokens), strict=True):
            question = _as_question(text if self._by_request else stem + text)
            # A small model tends to repeat the question of a worked example.
            if question and question not in backbone.prompt.prefix and (number, question) not in questions:
                questions.append((number, question))
        # 4. Answer greedily, and drop questions without an answer.
        rows = [(number, backbone.encode_question(question)) for number, question in questions]
        answers = teacher.decode(
            [Row(number, tuple(ids), len(ids)) for number, ids in rows],
            most=self.answer_tokens,
            ends=stop_ids(backbone),
            as_answers=True,
        )
        found: list[list[tuple[str, str]]] = [[] for _ in passages]
        for (number, question), answer in zip(questions, self._texts(answers), strict=True):
            if answer.strip() and "\0" not in answer:
                found[number].append((question, answer.strip()))
        return found

    @property
    def _by_request(self) -> bool:
        """Whether to request a question: a chat template has no text before questions that the model could continue."""
        return not self.backbone.prompt.question_before.strip()

    def _opening(self, number: int, stem: str) -> Row:
        """Opening of a question about the passage with this number."""
        if self._by_request:
            request = _REQUEST.format(begin=f", beginning with {stem!r}" if stem else "")
            ids = self.backbone.encode_question(request)
        else:
            ids = self.backbone.encode((self.backbone.prompt.question_before + stem).rstrip())
        return Row(number, tuple(ids), len(ids))

    @cached_property
    def _question_ends(self) -> set[int]:
        """Tokens that contain a question mark or a line break, and tokens that end an answer."""
        tokenizer = self.backbone.tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        return {token for token, text in enumerate(texts) if "?" in text or "\n" in text} | stop_ids(self.backbone)

    def _texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Decoded texts, each cut at a stop string, which may be inside its last token."""
        texts = [str(self.backbone.tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]
        for stop in self.backbone.prompt.stop:
            texts = [text.split(stop)[0] if text.strip() else text for text in texts]
        return texts


@contextmanager
def _file_errors(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"the file of questions cannot be used: {error}",
            where=str(path),
            next_step="Free disk space, or remove the file if it cannot be read; then run it again.",
        ) from error


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _as_question(text: str) -> str | None:
    """The first line of a text up to its question mark; None if that is not a question."""
    line, found, _ = text.strip().partition("\n")[0].partition("?")
    question = " ".join(line.split()) + "?"
    # Data sets reject NUL. A replacement character comes from an incomplete UTF-8 sequence.
    is_text = "\0" not in question and "\N{REPLACEMENT CHARACTER}" not in question
    return question if found and is_text and len(question.split()) >= _FEWEST_WORDS else None
