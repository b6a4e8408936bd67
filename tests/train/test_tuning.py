"""Domain tuning: cutting a corpus, and questions the model writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kv_memory.compress.refine.teacher import Teacher
from kv_memory.datasets import Example, Question
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.train import questions
from kv_memory.train.data import cut_corpus
from kv_memory.train.questions import QuestionWriter
from kv_memory.train.settings import TrainSettings, domain_settings
from tests.conftest import make_backbone
from tests.memories import wide_backbone

PASSAGES = ["The ferry leaves at 7.40.", "The lamp burned oil until 1921, when it was replaced."]


def pages(n: int = 10) -> list[Example]:
    return [
        Example(
            id=f"corpus/{number}.md",
            context="\n\n".join(f"Paragraph {i} of page {number} tells of nothing in particular." for i in range(9)),
            questions=(),
            source="corpus",
        )
        for number in range(n)
    ]


# -- cutting -----------------------------------------------------------------------------------------------------------


def test_training_pages_are_cut_and_others_held_out(backbone: Any) -> None:
    wide = wide_backbone()
    corpus = cut_corpus(pages(), wide, window_tokens=300)
    of_page = {window.example.id.split("#")[0] for window in corpus.train}
    assert 1 <= len(corpus.held_out_ids) <= 4 and not of_page & set(corpus.held_out_ids)
    assert of_page | set(corpus.held_out_ids) == {page.id for page in pages()}
    assert {window.example.id.split("#")[0] for window in corpus.held_out} == set(corpus.held_out_ids)
    for window in corpus.train:
        assert len(wide.encode(window.example.context)) <= 300
        assert all(len(wide.encode(passage)) <= 256 for passage in window.passages)
        assert "".join(window.passages).replace("\n", "") == window.example.context.replace("\n", "")
    assert len(corpus.train) > len(of_page) and any(len(window.passages) > 1 for window in corpus.train)
    # A page stays on its side when others come.
    assert set(corpus.held_out_ids) <= set(cut_corpus(pages(20), wide).held_out_ids)


def test_windows_fit_the_context_window_of_the_model(backbone: Any) -> None:
    corpus = cut_corpus(pages(4), backbone, window_tokens=5000)
    room = backbone.context_window - len(backbone.prefix_ids) - 256
    assert len(corpus.train) > 2 and all(len(backbone.encode(w.example.context)) <= room for w in corpus.train)


def test_a_single_page_is_used_for_training(backbone: Any) -> None:
    corpus = cut_corpus(pages(1), backbone)
    assert corpus.train and not corpus.held_out


def test_a_window_has_the_questions_about_all_its_passages(backbone: Any) -> None:
    window = cut_corpus(pages(1), wide_backbone(), window_tokens=300).train[0]
    asked = [(Question(text=f"Question {n} about it?", answers=("yes",)),) for n in range(len(window.passages))]
    whole, *parts = window.examples(asked)
    assert whole.context == window.example.context and whole.questions == tuple(q for part in asked for q in part)
    assert [(part.context, part.questions) for part in parts] == list(zip(window.passages, asked, strict=True))
    assert len({whole.id, *(part.id for part in parts)}) == 1 + len(parts) > 2


def test_windows_too_short_for_questions_are_rejected(backbone: Any) -> None:
    with pytest.raises(ConfigError, match="too short to ask about"):
        cut_corpus(pages(1), backbone, window_tokens=15)


def test_an_empty_corpus_is_an_error(backbone: Any) -> None:
    with pytest.raises(DatasetError):
        cut_corpus([], backbone)


def test_tuning_defaults_to_low_ratios_unless_given() -> None:
    assert (domain_settings(TrainSettings()).min_ratio, domain_settings(TrainSettings()).max_ratio) == (0.005, 0.3)
    told = domain_settings(TrainSettings(min_ratio=0.02, max_ratio=0.6), given=["min_ratio"])
    assert (told.min_ratio, told.max_ratio, told.max_tokens) == (0.02, 0.6, 1536)
    assert domain_settings(TrainSettings(min_ratio=0.001, max_ratio=0.002), given=["max_ratio"]).min_ratio == 0.002


# -- questions ---------------------------------------------------------------------------------------------------------


class Scripted(Teacher):
    """Writes what it is told instead of what a random model would babble."""

    n_calls = 0

    def decode(self, rows: Any, *, temperature: float = 0.0, **_: Any) -> list[list[int]]:
        Scripted.n_calls += 1
        says = [" is it? More", " leaves at night?", " is\nnot one", " is it? Again", " a?"]
        texts = says if temperature else [" At night ", " "]
        return [self._backbone.encode_text(texts[i % len(texts)]) for i in range(len(rows))]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(questions, "Teacher", Scripted)
    monkeypatch.setattr(Scripted, "n_calls", 0)
    return Scripted


def test_questions_begin_with_a_stem_and_end_at_the_question_mark(backbone: Any, scripted: type[Scripted]) -> None:
    writer = QuestionWriter(backbone, n_questions=5)
    found = writer.write(PASSAGES[:1])
    # Stems What, How, Which, Why, When. "Which is" and "When a?" are no questions, and the second has no answer.
    assert [(q.text, q.answers) for q in found[0]] == [("What is it?", ("At night",)), ("Why is it?", ("At night",))]


def test_written_questions_are_reused_and_missing_ones_added(
    backbone: Any, scripted: type[Scripted], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "questions.jsonl"
    told: list[tuple[int, int]] = []
    first = QuestionWriter(backbone, n_questions=2).write(PASSAGES[:1], path=path)
    n_calls = scripted.n_calls
    with path.open("a") as file:
        file.write('{"key": "torn')
    both = QuestionWriter(backbone, n_questions=2).write(PASSAGES, path=path, on_passage=lambda *n: told.append(n))
    assert both[0] == first[0] and both[1] and scripted.n_calls == n_calls + 2 and told == [(2, 2)]
    assert len([line for line in path.read_text().splitlines() if line.endswith("}")]) == 2
    assert (
        QuestionWriter(backbone, n_questions=2).write(PASSAGES, path=path) == both and scripted.n_calls == n_calls + 2
    )
    # Another seed, model or number of questions asks other questions.
    QuestionWriter(backbone, n_questions=2, seed=1).write(PASSAGES[:1], path=path)
    QuestionWriter(make_backbone("qwen2"), n_questions=2).write(PASSAGES[:1], path=path)
    assert scripted.n_calls == n_calls + 6
    json.loads(path.read_text().splitlines()[-1])


def test_questions_are_reproducible_and_independent_of_batching(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "_as_question", lambda text: text.replace("\0", "") or None)  # whatever it babbles
    monkeypatch.setattr(questions, "QUESTION_TOKENS", 6)
    one = QuestionWriter(backbone, n_questions=3, answer_tokens=4).write(PASSAGES)
    assert [len(found) for found in one] == [3, 3]
    assert len({q.text for found in one for q in found}) == 6
    assert QuestionWriter(backbone, n_questions=3, answer_tokens=4).write(PASSAGES) == one
    together = QuestionWriter(backbone, n_questions=3, answer_tokens=4, batch_passages=2)
    assert together.write(PASSAGES) == one
    other = QuestionWriter(backbone, n_questions=3, answer_tokens=4, seed=1).write(PASSAGES)
    assert other != one


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Who was it? And", "Who was it?"),
        ("  Who   was\tit?", "Who was it?"),
        ("Who was it", None),
        ("Who?", None),
        ("Who was\nit?", None),
        ("Who wa\ufffd it?", None),
    ],
)
def test_as_question_accepts_only_complete_questions(text: str, question: str | None) -> None:
    assert questions._as_question(text) == question


def test_a_folder_as_question_file_is_an_error(backbone: Any, scripted: type[Scripted], tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        QuestionWriter(backbone).write(PASSAGES, path=tmp_path)
