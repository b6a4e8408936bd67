"""The applications in examples/: plain text RAG, and the same switched to distilled caches in at most five lines."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FRAMEWORKS = ["langchain", "llama_index"]
QUESTIONS = {"Who opened the observatory?": "Ida Brandt", "Who is the harbour master?": "Nils Aker"}

slow = pytest.mark.slow
# Both forms take the model that `embedded` stands for; the larger one would only take longer.
on_smollm2 = pytest.mark.usefixtures("only_smollm2")


def ask(name: str, folder: Path, questions: list[str], cwd: Path) -> dict[str, str]:
    """Run an example as its README says; the answer to each question."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(folder), *questions],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = dict(line.split(" -> ", 1) for line in done.stdout.splitlines() if " -> " in line)
    assert list(answers) == questions, done.stdout
    return answers


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_switching_changes_at_most_five_lines(framework: str) -> None:
    before, after = (
        [line for line in (EXAMPLES / f"{framework}_{form}.py").read_text().splitlines() if line.strip()]
        for form in ("text", "caches")
    )
    changes = [line for line in difflib.ndiff(before, after) if line[:2] in {"+ ", "- "}]
    assert 0 < sum(line.startswith("+ ") for line in changes) <= 5
    assert sum(line.startswith("- ") for line in changes) <= 5
    assert any("kv_memory.integrations" in line for line in changes)
    assert not any("kv_memory" in line for line in before)


@slow
@on_smollm2
@pytest.mark.parametrize("form", ["text", "caches"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_examples_answer_about_the_included_pages(framework: str, form: str, tmp_path: Path) -> None:
    # From the text, in its chat template, the model answers the second question wrongly.
    asked = QUESTIONS if form == "caches" else {next(iter(QUESTIONS)): "Ida Brandt"}
    answers = ask(f"{framework}_{form}", EXAMPLES / "pages", list(asked), tmp_path)
    assert all(expected in answers[question] for question, expected in asked.items()), answers
    assert (tmp_path / "kv-store").is_dir() == (form == "caches")
