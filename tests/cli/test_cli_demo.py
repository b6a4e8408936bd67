"""The demo, on documents of one's own with a tiny model, and as it is with the built-in ones."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.cli.compare import Comparison, medians
from kv_memory.memory import Answer
from kv_memory.model.embedded import BUILT_IN
from tests.cli.ran import Ran


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "ferry.md").write_text("# The ferry\n\nThe ferry to Skarholm leaves at 7.40 from pier 4.")
    (folder / "light.md").write_text("# The lighthouse\n\nThe lighthouse of Orvik burned whale oil until 1921.")
    return folder


def test_demo_with_given_documents_and_questions(
    kv: Callable[..., Ran], tiny: Path, docs: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("When does the ferry leave?\n\nWhat did the lighthouse burn?\nxyzzy\n")
    run = [
        "demo",
        "--docs",
        docs,
        "--model",
        tiny,
        "--questions",
        questions,
        "--keep",
        tmp_path / "kept",
        "--keep-ratio",
        0.5,
    ]
    summary = kv(*run, "--json").json
    compressed = summary["compressed"]
    assert compressed["n_documents"] == 2 and compressed["tokens_per_s"] > 0
    assert compressed["factor"] == pytest.approx(compressed["full_kv_bytes"] / compressed["cache_bytes"])
    assert 1.5 < compressed["factor"] < 2.2  # positions cost a little
    ferry, light, nothing = summary["questions"]
    assert [Path(q["document_id"]).name for q in (ferry, light)] == ["ferry.md", "light.md"]
    assert nothing["document_id"] is None and nothing["ttft_ratio"] is None
    for question in (ferry, light):
        caches, text = question["caches"], question["text"]
        assert (caches["read_from"], text["read_from"]) == ("caches", "text")
        assert caches["sources"] == text["sources"] and len(caches["sources"]) == 1
        assert question["ttft_ratio"] == pytest.approx(text["ttft_s"] / caches["ttft_s"])
    assert summary["medians"]["n_questions"] == summary["n_questions"] == 2
    assert (summary["right_cached"], summary["right_text"], summary["n_known"]) == (None, None, 0)  # nobody knows
    empty = [sum(not q[way]["text"] for q in (ferry, light)) for way in ("caches", "text")]
    assert [summary["empty_cached"], summary["empty_text"]] == empty
    assert summary["factor"] == compressed["factor"]
    # The kept store is used again, and an answer is what `ask` gives.
    again = kv(*run, "--json").json["compressed"]
    assert again["tokens_per_s"] is None and again["cache_bytes"] == compressed["cache_bytes"]
    ask = ["ask", ferry["question"], "--store", tmp_path / "kept", "--collection", "demo", "--max-new-tokens", 24]
    assert kv(*ask, "--top-k", 1, "--json").json["text"] == ferry["caches"]["text"]


def test_demo_prints_text_and_leaves_no_store(kv: Callable[..., Ran], tiny: Path, docs: Path, tmp_path: Path) -> None:
    done = kv("demo", "--docs", docs, "--model", tiny)
    assert done.code == 0
    assert "made from headings" in done.err
    assert "What does it say about The ferry?" in done.out and "What does it say about The lighthouse?" in done.out
    assert "Full KV" in done.out and "tokens/s" in done.out and "Median time to first token" in done.out
    assert "of 2 questions" in done.out
    assert "Right answers" not in done.out and "Empty answers" in done.out
    assert "The model is" not in done.out  # said of built-in models only
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]  # the store was temporary


def test_unreadable_questions_are_an_error(kv: Callable[..., Ran]) -> None:
    done = kv("demo", "--questions", "nothing.txt", "--json")
    assert done.code == 1 and done.json["error"]["error"] == "UnreadableDocumentError"


def _answer(text: str, ttft_s: float) -> Answer:
    return Answer(
        question="?",
        text=text,
        sources=(),
        finish_reason="stop",
        n_prompt_tokens=1,
        n_cached_tokens=1,
        ttft_s=ttft_s,
        total_s=2 * ttft_s,
        read_from="caches",
    )


def test_medians() -> None:
    pairs = [("NumPy", "numpy.", 1.0, 4.0), ("a", "b", 2.0, 6.0), ("c", "c", 9.0, 5.0), ("", "", 9.0, 9.0)]
    pairs.append((" ", "b", 1.0, 1.0))
    results = [
        Comparison(question="?", accepted=known, document_id="d", caches=_answer(a, s), text=_answer(b, t))
        for (a, b, s, t), known in zip(pairs, [("numpy",), ("b",), (), ("x",), ("b",)], strict=True)
    ]
    results.append(Comparison(question="?", document_id=None, caches=_answer("", 0), text=_answer("", 0)))
    overall = medians(results)
    assert overall is not None
    assert (overall.n_questions, overall.n_known) == (5, 4)
    assert (overall.right_cached, overall.right_text) == (1, 3)
    assert (overall.empty_cached, overall.empty_text, overall.n_both_empty) == (2, 1, 1)
    assert overall.n_same == 2  # two empty answers are no agreement
    assert (overall.caches_ttft_s, overall.text_ttft_s, overall.ttft_ratio) == (2.0, 5.0, 2.5)
    assert (overall.caches_total_s, overall.text_total_s) == (44.0, 50.0)
    assert medians(results[5:]) is None
    unknown = medians(results[2:3])
    assert unknown is not None and (unknown.n_known, unknown.right_cached, unknown.right_text) == (0, None, None)


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
