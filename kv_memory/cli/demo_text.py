"""The demo's output on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kv_memory.cli.compare import Comparison, Medians
from kv_memory.cli.output import Output, factor_text, size_text
from kv_memory.model.embedded import BUILT_IN

if TYPE_CHECKING:
    from kv_memory.documents import Document
    from kv_memory.memory import KVMemory

__all__ = ["Compressed", "introduce", "print_compressed", "print_end", "print_result"]


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The contents of the demo's store.

    Attributes:
        n_documents: Number of documents in the store.
        n_passages: Number of their passages.
        n_tokens: Number of tokens that the caches stand for, including the prompt form's wrappers.
        full_kv_bytes: Size of the full caches in bytes.
        cache_bytes: Size of the distilled caches in bytes.
        factor: `full_kv_bytes` divided by `cache_bytes`.
        elapsed_s: Time to compress in seconds; 0 if everything was stored already.
        tokens_per_s: Speed of compression in this run; None if nothing was compressed.
    """

    n_documents: int
    n_passages: int
    n_tokens: int
    full_kv_bytes: int
    cache_bytes: int
    factor: float
    elapsed_s: float
    tokens_per_s: float | None


def introduce(out: Output, documents: Sequence[Document], model: str, *, from_packages: bool) -> None:
    """Print the model and the documents."""
    if out.as_json:
        return
    if model in BUILT_IN:
        size = ", which is small and often wrong" if model == "smollm2" else ""
        out.line(f"The model is {BUILT_IN[model].title}{size}.", style="bold")
    if from_packages:
        out.line(
            f"The documents are the descriptions of {len(documents)} installed Python packages (the first paragraphs, "
            f"as prose): {', '.join(document.id for document in documents)}."
        )


def print_compressed(out: Output, compressed: Compressed, memory: KVMemory) -> None:
    """Print the time that compression took, and the sizes before and after."""
    speed = "compressed in an earlier run"
    if compressed.tokens_per_s is not None:
        speed = f"{compressed.elapsed_s:.0f} s, {compressed.tokens_per_s:,.0f} tokens/s"
    rows = [
        (
            "Documents",
            f"{compressed.n_documents:,} in {compressed.n_passages:,} passages, {compressed.n_tokens:,} tokens",
        ),
        ("Compressed in" if compressed.elapsed_s else "Compressed", speed),
        ("Full KV", size_text(compressed.full_kv_bytes)),
        (
            "Distilled",
            f"{size_text(compressed.cache_bytes)}, {factor_text(compressed.full_kv_bytes, compressed.cache_bytes)} "
            f"({memory.settings.keep}, {'learned' if memory.settings.adapter else 'no training'})",
        ),
    ]
    out.line()
    out.table(("", ""), rows)
    out.line()
    out.line("Each question is answered twice by the same model, over the same passage: from its distilled cache,")
    out.line("and with its text in the prompt. In brackets: time to first token.")


def print_result(out: Output, result: Comparison) -> None:
    """Print both answers to a question."""
    if out.as_json:
        return
    out.line()
    out.line(result.question, style="bold")
    if result.document_id is None:
        out.line("  no passage shares a word with this question")
        return
    for name, answer in (("caches", result.caches), ("text", result.text)):
        judged = {True: "  right", False: "  wrong", None: ""}[result.is_right(answer)]
        out.line(f"  {name:<6}  {answer.text or '(nothing)'}  [{answer.ttft_s:.3f} s]{judged}")
    out.line(f"  {result.ttft_ratio:.1f}x sooner from the cache; passage of {result.document_id}", style="dim")


def print_end(out: Output, overall: Medians | None, *, model: str, keep: Path | None) -> None:
    """Print the counts and medians, and commands to run next."""
    out.line()
    if overall is not None:
        n, known = overall.n_questions, overall.n_known
        rows = [
            ("", "Distilled caches", "Text"),
            ("Right answers", f"{overall.right_cached} of {known}", f"{overall.right_text} of {known}"),
            ("Empty answers", f"{overall.empty_cached} of {n}", f"{overall.empty_text} of {n}"),
            ("Median time to first token", f"{overall.caches_ttft_s:.3f} s", f"{overall.text_ttft_s:.3f} s"),
            ("All answers", f"{overall.caches_total_s:.1f} s", f"{overall.text_total_s:.1f} s"),
        ]
        out.table(("", "", ""), [row for row in rows if known or row[0] != "Right answers"])
        out.line(
            f"First token {overall.ttft_ratio:.1f}x sooner; the same answer both ways to {overall.n_same} of {n} "
            f"questions, an empty one both ways to {overall.n_both_empty}."
        )
        out.line()
    if keep is not None:
        out.line(f'The store is kept. Ask more questions: kv-memory ask --store {keep} --collection demo "QUESTION"')
    if model in BUILT_IN:
        out.line("To try your own model and documents:")
        out.line("  kv-memory demo --model Qwen/Qwen2.5-1.5B-Instruct --docs DIR")
