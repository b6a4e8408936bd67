"""Every notebook runs from top to bottom, and says what it said when it was committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kv_memory.model.embedded import BUILT_IN

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def printed(notebook: Any) -> list[str]:
    """What the cells print, without figures: they differ from machine to machine."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return [line for line in text.splitlines() if not any(character.isdigit() for character in line)]


def test_each_framework_has_a_notebook() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["langchain", "llama_index"]


@pytest.mark.slow
@pytest.mark.skipif(not BUILT_IN["smollm2"].is_prepared, reason="smollm2 is not prepared (`make setup`)")
# The client of Jupyter closes its event loop and its sockets late; both are gone when the test ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reproduces_its_printed_output(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    committed = nbformat.read(path, as_version=4)
    said = printed(committed)
    assert len(said) >= 3
    ran = NotebookClient(committed, timeout=300).execute(cwd=str(path.parent))
    assert printed(ran) == said
