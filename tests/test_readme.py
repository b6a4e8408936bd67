"""README.md: its example runs as printed, its order is the promised one, its file tree is the real one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kv_memory.embedded import BUILT_IN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_sections_come_in_order() -> None:
    marks = ["make demo", "make test", "```python", "| tokens |", "## The files"]
    places = [README.index(mark) for mark in marks]
    assert places == sorted(places)


def test_the_file_tree_names_what_is_there() -> None:
    tree = README.split("## The files")[1].split("```")[1]
    names = [line.split()[0] for line in tree.strip().splitlines()]
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "kv_memory" / name).exists(), name
    mentioned = set(re.findall(r"[\w/]+(?:\.py|/)", tree))
    for path in (ROOT / "kv_memory").iterdir():
        if path.name.startswith("_") or path.suffix not in {"", ".py"}:
            continue
        assert path.name + ("/" if path.is_dir() else "") in mentioned, f"{path.name} is missing in the file tree"


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
def test_the_example_runs_as_printed(tmp_path: Path, said: str) -> None:
    example = README.split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 8
    answers = run(example, tmp_path, said).splitlines()
    assert len(answers) == 2
    assert "Ida Brandt" in answers[0]
    assert all(re.search(r"\(\d+ tokens read, \d+ from caches\)$", line) for line in answers)


@pytest.mark.slow
@pytest.mark.parametrize("said", ["smollm2"], indirect=True)  # on both models they would take two minutes more
@pytest.mark.parametrize(("framework", "answer"), [("llama_index", "Agnes Holm"), ("langchain", "1931")])
def test_the_quick_starts_run_as_printed(framework: str, answer: str, tmp_path: Path, said: str) -> None:
    blocks = re.findall("```python\n(.*?)```", README, re.DOTALL)
    (example,) = (block for block in blocks if f"integrations.{framework}" in block)
    assert answer in run(example, tmp_path, said)
