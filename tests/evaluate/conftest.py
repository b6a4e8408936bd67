from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.memories import wide_backbone

WORDS = ["ferry", "pier", "lamp", "whale", "office", "harbour", "walrus", "kettle", "violin", "comet", "turnip"]


def prose(seed: int, n_sentences: int) -> str:
    """Sentences, other ones for every seed."""
    words = [WORDS[(seed * 7 + i * 5) % len(WORDS)] for i in range(n_sentences + 2)]
    return " ".join(
        f"The {words[i]} number {seed}{i} came before the {words[i + 1]} and the {words[i + 2]}."
        for i in range(n_sentences)
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with small sets in the form of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = [
        {
            "context": prose(seed, 1 + seed),
            "qas": [
                {"id": f"{seed}-{i}", "question": f"What came {i} times?", "answers": [{"text": f"{seed}{i}"}]}
                for i in range(1 + seed % 2 + 5 * (seed == 3))
            ],
        }
        for seed in range(4)
    ]
    write(folder / "squad" / "dev.json", json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    options = ["a pier", "the whale oil", "no", "an office in the harbour"]
    stories = [
        {"article_id": str(i), "article": prose(i, 9), "question": "What is it?", "options": options, "gold_label": i}
        for i in range(2)
    ]
    write(folder / "quality" / "dev_sample.jsonl", "".join(json.dumps(story) + "\n" for story in stories))
    summaries = {
        "metadata": {"passage_id": "1"},
        "document": prose(5, 9),
        "questions": [
            {"question_text": "What is the plot?", "question_number": 1, "responses": [{"response_text": "A pier."}]}
        ],
    }
    write(folder / "squality" / "dev.jsonl", json.dumps(summaries) + "\n")
    write(folder / "needle" / "essay.txt", prose(1, 40))
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def roomy() -> Any:
    """A tiny Llama with room for documents; no test may change it."""
    return wide_backbone()
