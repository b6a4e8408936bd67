"""The demo, on documents of one's own with a tiny model, and as it is with the built-in ones."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kv_memory.cli.demo import _medians
from kv_memory.cli.demo_documents import PACKAGES, QUESTIONS, _prose, known_questions, package_documents
from kv_memory.evaluate.metrics import contains
from kv_memory.model.embedded import BUILT_IN
from tests.cli.ran import Ran


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "ferry.md").write_text("# The ferry\n\nThe ferry to Skarholm leaves at 7.40 from pier 4.")
    (folder / "light.md").write_text("# The lighthouse\n\nThe lighthouse of Orvik burned whale oil until 1921.")
    return folder


@pytest.fixture
def run(kv: Callable[..., Ran], tiny: Path, docs: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Run the demo on the documents, with a question to each and one to none."""
    questions = tmp_path / "questions.txt"
    questions.write_text("When does the ferry leave?\n\nWhat did the lighthouse burn?\nxyzzy\n")
    return partial(kv, "demo", "--docs", docs, "--questions", questions, "--model", tiny, "--keep-ratio", "1/2")


def test_the_summary_has_sizes_answers_and_medians(run: Callable[..., Ran]) -> None:
    summary = run("--json").json
    compressed = summary["compressed"]
    assert compressed["n_documents"] == 2 and compressed["tokens_per_s"] > 0
    assert summary["factor"] == compressed["factor"] == compressed["full_kv_bytes"] / compressed["cache_bytes"]
    assert 1.5 < compressed["factor"] < 2.2  # positions cost a little
    ferry, light, nothing = summary["questions"]
    assert [Path(q["document_id"]).name for q in (ferry, light)] == ["ferry.md", "light.md"]
    assert nothing["document_id"] is None and nothing["ttft_ratio"] is None
    for question in (ferry, light):
        caches, text = question["caches"], question["text"]
        assert (caches["read_from"], text["read_from"]) == ("caches", "text")
        assert caches["sources"] == text["sources"] and len(caches["sources"]) == 1
        assert question["ttft_ratio"] == text["ttft_s"] / caches["ttft_s"]
    assert summary["medians"]["n_questions"] == summary["n_questions"] == 2
    assert (summary["right_cached"], summary["right_text"], summary["n_known"]) == (None, None, 0)  # nobody knows
    empty = [sum(not q[way]["text"] for q in (ferry, light)) for way in ("caches", "text")]
    assert [summary["empty_cached"], summary["empty_text"]] == empty


def test_the_demo_prints_text_and_leaves_no_store(run: Callable[..., Ran], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("--limit", 2)
    assert done.code == 0
    assert "When does the ferry leave?" in done.out and "What did the lighthouse burn?" in done.out
    assert "Full KV" in done.out and "tokens/s" in done.out and "Median time to first token" in done.out
    assert "Empty answers" in done.out and "Right answers" not in done.out
    assert sorted(tmp_path.iterdir()) == before  # the store was temporary


def test_missing_questions_are_an_error(kv: Callable[..., Ran], docs: Path) -> None:
    done = kv("demo", "--docs", docs, "--questions", "nothing.txt", "--json")
    assert done.code == 1 and done.json["error"]["error"] == "UnreadableDocumentError"
    done = kv("demo", "--docs", docs, "--json")
    assert done.code == 2 and done.json["error"]["where"] == "--docs"


def result(cached: str, text: str, ttft_s: tuple[float, float], known: tuple[str, ...] = ()) -> dict[str, Any]:
    answers = [{"text": said, "ttft_s": s, "total_s": 2 * s} for said, s in zip((cached, text), ttft_s, strict=True)]
    right = [bool(contains(said, known)) if known else None for said in (cached, text)]
    found = {"accepted": known, "document_id": "d", "caches": answers[0], "text": answers[1]}
    return {**found, "right_cached": right[0], "right_text": right[1]}


def test_medians() -> None:
    results = [
        result("NumPy", "numpy.", (1.0, 4.0), ("numpy",)),
        result("a", "b", (2.0, 6.0), ("b",)),
        result("c", "c", (9.0, 5.0)),
        result("", "", (9.0, 9.0), ("x",)),
        result(" ", "b", (1.0, 1.0), ("b",)),
    ]
    nowhere = {**result("", "", (0.0, 0.0)), "document_id": None}
    found = _medians([*results, nowhere])
    assert found is not None and _medians([nowhere]) is None
    assert (found["n_questions"], found["n_known"]) == (5, 4)
    assert (found["right_cached"], found["right_text"]) == (1, 3)
    assert (found["empty_cached"], found["empty_text"], found["n_both_empty"]) == (2, 1, 1)
    assert found["n_same"] == 2  # two empty answers are no agreement
    assert (found["caches_ttft_s"], found["text_ttft_s"], found["ttft_ratio"]) == (2.0, 5.0, 2.5)
    assert (found["caches_total_s"], found["text_total_s"]) == (44.0, 50.0)
    assert (_medians(results[2:3]) or {})["right_cached"] is None


MARKDOWN = """\
[![CI](https://ci.example/badge.svg)](https://ci.example/run)
<div align="center"><img src="x.png"></div>

# Ferry

Ferry is a **library** for [crossing](https://example.org/a_(b)) water, written in `Python` by <b>one</b> person.
It has no engine. <!-- hidden
words -->

```python
import ferry  # this is no prose at all, and must go.
```

It can do all of these things:

- Row with *two* oars, forwards or backwards
- Sail where there is wind.

| a | table of things that has enough words. |

See https://example.org/manual for all there is to know.

Short one.

[docs]: https://example.org "a title with more than enough words."
"""

RST = """\
Ferry
=====

|PyPI| |Downloads|

.. |PyPI| image:: https://img.example/pypi.svg
    :target: https://pypi.example/ferry

`Ferry <https://example.org>`_ is a library for crossing water,
and uses :class:`Oar` and ``Sail``.

.. code-block:: python

    import ferry  # no prose either, whatever it looks like.

An example follows here for everybody to see::

    >>> ferry.cross("the wide and very deep river.")

The author_ is Maren Dahl, who lives by the water.
"""


def test_prose_of_markdown_and_restructured_text() -> None:
    assert _prose(MARKDOWN, 900).split("\n\n") == [
        "Ferry is a library for crossing water, written in Python by one person. It has no engine.",
        "- Row with two oars, forwards or backwards\n- Sail where there is wind.",
        "See for all there is to know.",
    ]
    assert _prose(RST, 900).split("\n\n") == [
        "Ferry is a library for crossing water, and uses Oar and Sail.",
        "The author is Maren Dahl, who lives by the water.",
    ]
    assert _prose(MARKDOWN, 100).count("\n\n") == 0


def test_every_question_of_the_demo_can_be_answered_from_an_installed_package() -> None:
    """A package that has lost its prose or an answer must be replaced, and so must its questions."""
    documents = package_documents((*PACKAGES, "no-such-package-anywhere"))
    assert [document.id for document in documents] == list(PACKAGES)
    assert known_questions(documents) == list(QUESTIONS) and len(QUESTIONS) >= 12
    for document in documents:
        assert 300 < len(document.text) < 1300
        assert not any(mark in document.text for mark in ("```", "](", "<img", "https://", ".. "))
    for question in QUESTIONS:
        assert not contains(question.text, question.accepted), question


@pytest.mark.slow
def test_demo_uses_smollm2_if_only_that_is_prepared(
    process: Callable[..., subprocess.Popen[str]], tmp_path: Path, only_smollm2: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    with process("demo", "--limit", 2, "--json", cwd=here) as ran:
        out, err = ran.communicate(timeout=300)
    assert ran.returncode == 0, err
    assert f"Note: {only_smollm2}" in err
    summary = json.loads(out)
    assert summary["settings"]["model"] == "smollm2"
    assert summary["compressed"]["n_documents"] == len(summary["documents"]) == 1  # what is asked about
    assert 100 < summary["compressed"]["n_tokens"] < 500
    factor = summary["factor"]  # an eighth of the entries, as int8
    assert 13.5 < factor < 15.8 or 27 < factor < 31.6, factor  # of bfloat16, or of float32 where that is slow
    first, second = summary["questions"]
    assert (first["document_id"], second["document_id"]) == ("alembic", "alembic")
    assert first["caches"]["text"] and first["text"]["text"]
    assert (summary["n_questions"], summary["n_known"], summary["empty_text"]) == (2, 2, 0)
    assert summary["medians"]["ttft_ratio"] > 1  # a passage of 200 tokens costs more to prefill than to read
    assert list(here.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not BUILT_IN["qwen-0.5b"].is_prepared, reason="qwen-0.5b is not prepared (`make setup`)")
def test_demo_answers_correctly_with_qwen(process: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    with process("demo", "--limit", 2, cwd=tmp_path) as ran:
        out, err = ran.communicate(timeout=600)
    assert ran.returncode == 0, err
    assert "The model is Qwen2.5-Coder-0.5B-Instruct." in out and "Note:" not in err
    (cached, text) = re.findall(r"(\d) of 2", next(line for line in out.splitlines() if "Right answers" in line))
    assert (cached, text) == ("2", "2")
