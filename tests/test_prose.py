"""The check for plain English finds banned phrases in comments, docstrings and messages, and nothing in the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import prose


@pytest.mark.parametrize(
    "source",
    [
        "# An interrupted export is gone on with.\n",
        '"""Reads it anew."""\n',
        'raise ValueError("this is none")\n',
        'def f(size):\n    """A function.\n\n    Args:\n        size: Of the blob.\n    """\n',
        'x = f"{1} caches, so many"\n',
    ],
)
def test_banned_phrases_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(source)
    assert len(list(prose.problems(tmp_path / "module.py"))) == 1


def test_a_line_can_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text('NAME = "goes on with"  # prose: ok\n')
    assert list(prose.problems(tmp_path / "module.py")) == []


def test_the_package_has_no_banned_phrase() -> None:
    assert prose.main() == 0
