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


needs_model = pytest.mark.skipif(
    not BUILT_IN["smollm2"].is_prepared, reason="the embedded model is not prepared (`make setup`)"
)


def run(example: str, folder: Path) -> str:
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
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
@needs_model
def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    example = README.split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 8
    answers = run(example, tmp_path).splitlines()
    assert len(answers) == 2
    assert "Ida Brandt" in answers[0]
    assert all(re.search(r"\(\d+ tokens read, \d+ from caches\)$", line) for line in answers)


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize(("framework", "said"), [("llama_index", "Agnes Holm"), ("langchain", "1931")])
def test_the_quick_starts_run_as_printed(framework: str, said: str, tmp_path: Path) -> None:
    blocks = re.findall("```python\n(.*?)```", README, re.DOTALL)
    (example,) = (block for block in blocks if f"integrations.{framework}" in block)
    assert said in run(example, tmp_path)
