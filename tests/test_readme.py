"""README.md and docs: examples run as printed, and what they link to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kv_memory.model.embedded import BUILT_IN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def examples(path: str) -> list[str]:
    """The Python examples of a page, in order."""
    return re.findall("```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_and_mentioned_files_exist(path: str) -> None:
    page = (ROOT / path).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page) if "://" not in link]
    assert [link for link in links if not (ROOT / path).parent.joinpath(link).exists()] == []
    files = re.findall(r"(?<![\w/])((?:kv_memory|benchmarks)/[\w/]+\.py)", page)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_snippets_of_the_readme_are_short() -> None:
    assert all(len(example.strip().splitlines()) <= 10 for example in examples("README.md"))


@pytest.fixture(params=["qwen-0.5b", "smollm2"])
def said(request: pytest.FixtureRequest) -> str:
    """What is said of the model: nothing of qwen-0.5b; of smollm2, that it takes the place of the other."""
    if request.param == "smollm2":
        return str(request.getfixturevalue("only_smollm2"))
    if not BUILT_IN["qwen-0.5b"].is_prepared:
        pytest.skip("qwen-0.5b is not prepared (`make setup`)")
    return ""


def run(example: str, folder: Path, said: str) -> str:
    """What a fresh process prints that runs an example in a folder."""
    (folder / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == said
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("said", ["qwen-0.5b"], indirect=True)  # on smollm2 it is run from the wheel
def test_the_example_prints_what_the_readme_shows(tmp_path: Path, said: str) -> None:
    answers = run(examples("README.md")[0], tmp_path, said).splitlines()
    shown = README.split("example.py` prints")[1].split("```\n")[1].splitlines()
    assert len(answers) == len(shown) == 2
    assert "Ida Brandt" in answers[0] and "14 tons" in answers[1]
    assert [line.split(" (")[1] for line in answers] == [line.split(" (")[1] for line in shown]


@pytest.mark.slow
@pytest.mark.parametrize("said", ["smollm2"], indirect=True)  # on both models they would take two minutes more
@pytest.mark.parametrize(
    ("path", "uses", "answer"),
    [
        ("README.md", "KVMemoryQueryEngine", "Agnes Holm"),
        ("README.md", "create_kv_retrieval_chain", "1931"),
        ("docs/integrations.md", "KVMemoryQueryEngine", "Agnes Holm"),
        ("docs/integrations.md", "create_kv_retrieval_chain", "1931"),
        ("docs/integrations.md", "create_kv_history", "Biscuit"),
    ],
)
def test_snippets_for_frameworks_run_as_printed(path: str, uses: str, answer: str, tmp_path: Path, said: str) -> None:
    (example,) = (example for example in examples(path) if uses in example)
    assert answer in run(example, tmp_path, said)
