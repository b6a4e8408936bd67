"""`kv-memory demo`: compresses documents and answers questions, with figures measured live on this machine."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kv_memory.cli.ask import typed_lines
from kv_memory.cli.compare import Comparison, Medians, compare, medians
from kv_memory.cli.demo_questions import QUESTIONS, Question, known_questions
from kv_memory.cli.demo_text import Compressed, introduce, print_compressed, print_end, print_result
from kv_memory.cli.open_store import load_model, open_memory
from kv_memory.cli.options import Changes, JsonOption, setting_options
from kv_memory.cli.output import Output, plain, reporting
from kv_memory.cli.packages import PACKAGES, package_documents
from kv_memory.cli.progress import Tracker
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, UnreadableDocumentError
from kv_memory.model.embedded import EMBEDDED
from kv_memory.settings import KEEP_NAMES, MemorySettings

if TYPE_CHECKING:
    from kv_memory.documents import Document
    from kv_memory.memory import AddReport, KVMemory

__all__ = ["KEEP_RATIO", "demo", "derived_questions"]

KEEP_RATIO: float | None = 1 / 8  # the demo's default; None would be the default of new stores
_ASKED = 12  # number of built-in questions without --limit
_DERIVED = 6  # maximum number of questions made from headings
_HEADING = re.compile(r"^#{1,3} +(\S.*?)[ #]*$", re.MULTILINE)
_SETTINGS = DecodeSettings(max_new_tokens=24)


@setting_options(*KEEP_NAMES)
def demo(
    docs: Annotated[
        Path | None,
        typer.Option("--docs", metavar="FOLDER", help="Your documents.  [default: descriptions of installed packages]"),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", metavar="NAME", help="A built-in model, a model folder, or a Hugging Face hub id."),
    ] = EMBEDDED,
    *,
    changes: Changes,
    questions: Annotated[
        Path | None, typer.Option("--questions", metavar="FILE", help="Your questions, one per line.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="Maximum number of passages to answer from.")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            help=f"Maximum number of questions to ask.  [default: {_ASKED} of its own {len(QUESTIONS)}; all of yours]",
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="FOLDER", help="Keep the store here.  [default: a temporary folder]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try it: answers from distilled caches and from text, side by side.

    Documents are compressed, then each question is answered both ways by the same model, over the same passages.

    By default it compresses the first paragraphs of the descriptions of some Python packages installed here, and asks
    questions about them with known answers, in about two minutes. Nothing is prepared in advance.
    """
    with reporting(as_json=as_json) as out, ExitStack() as stack:
        if limit is not None and limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {limit}", where="--limit")
        changes = changes or {"keep_ratio": KEEP_RATIO}
        MemorySettings.resolve({}, **changes)
        wanted = _lines(questions) if questions is not None else None
        documents = _read(docs)
        if wanted is None and docs is None:  # compress only documents that a question is about
            about = {asked.package.lower() for asked in known_questions(documents)[: limit or _ASKED]}
            documents = [document for document in documents if document.id.lower() in about] or documents
        if keep is None:
            out.stopped = "The temporary store is deleted."
            keep_in = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-memory-demo-")))
        else:
            out.stopped = f"The compressed documents are in {keep}; run the same command to resume."
            keep_in = keep
        # The texts are kept, because every question is also answered from text.
        memory = stack.enter_context(
            open_memory(out, keep_in, "demo", create=True, model=model, **changes, keep_text=True)
        )
        introduce(out, documents, memory.settings.model, from_packages=docs is None)
        load_model(out, memory)
        with Tracker(out) as tracker:
            report = memory.add(documents, on_progress=tracker)
        compressed = _measure(memory, report)
        if not as_json:
            print_compressed(out, compressed, memory)
        asked = _choose(out, wanted, documents, from_packages=docs is None, limit=limit)
        if not asked:
            raise ConfigError(
                "there are no questions to ask", where="--questions", next_step="Pass a file with questions."
            )
        results = compare(
            memory, asked, top_k=top_k, settings=_SETTINGS, on_result=lambda result: print_result(out, result)
        )
        overall = medians(results)
        if as_json:
            out.json(_summary(memory, documents, compressed, results, overall))
        else:
            print_end(out, overall, model=memory.settings.model, keep=keep)


def _read(docs: Path | None) -> list[Document]:
    from kv_memory.documents import read_documents

    documents = list(read_documents(docs).documents) if docs is not None else package_documents(PACKAGES)
    if not documents:
        raise UnreadableDocumentError(
            "none of the packages that the demo describes is installed here", next_step="Pass --docs FOLDER."
        )
    return documents


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableDocumentError(
            f"the questions cannot be read: {error}",
            where=str(path),
            next_step="Pass a text file with one question per line.",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _choose(
    out: Output, wanted: list[str] | None, documents: Sequence[Document], *, from_packages: bool, limit: int | None
) -> list[Question]:
    """The questions to ask: the user's, those with known answers, typed ones, or ones made from headings."""
    if wanted is None and from_packages:
        return known_questions(documents)[: limit or _ASKED]
    return [Question(text) for text in (_typed(out, documents) if wanted is None else wanted)[:limit]]


def _typed(out: Output, documents: Sequence[Document]) -> list[str]:
    if sys.stdin.isatty() and not out.as_json:
        out.note("Type your questions, one per line; Ctrl-D ends.")
        typed = list(typed_lines(out))
        if typed:
            return typed
    out.note(
        "No questions were given, so they are made from headings and names. Pass better ones with --questions FILE"
    )
    return derived_questions(documents)


def derived_questions(documents: Iterable[Document]) -> list[str]:
    """Questions about unknown documents, made from their headings, or from a document's name if it has no headings."""
    topics: list[str] = []
    for document in documents:
        headings = _HEADING.findall(document.text)
        topics += headings[:2] or [Path(document.id).stem.replace("_", " ").replace("-", " ")]
    return [f"What does it say about {topic}?" for topic in dict.fromkeys(topics)][:_DERIVED]


def _measure(memory: KVMemory, report: AddReport) -> Compressed:
    # From the store, not from the report: with --keep, a second run compresses nothing.
    stored, caches = memory.stats(), memory.store.caches()
    keep, ours = memory.settings.keep, memory.compressor.fingerprint()
    caches = [c for c in caches if c.fingerprint == ours.digest and keep.fits(c.keep_ratio, c.n_tokens, ours)]
    n_tokens = sum(cache.n_tokens for cache in caches)
    full, small = n_tokens * memory.backbone.kv_bytes_per_token, sum(cache.size_bytes for cache in caches)
    return Compressed(
        n_documents=stored.n_documents,
        n_passages=stored.n_passages,
        n_tokens=n_tokens,
        full_kv_bytes=full,
        cache_bytes=small,
        factor=full / small,
        elapsed_s=report.elapsed_s if report.n_tokens else 0.0,
        tokens_per_s=report.n_tokens / report.elapsed_s if report.n_tokens else None,
    )


def _summary(
    memory: KVMemory,
    documents: Sequence[Document],
    compressed: Compressed,
    results: Sequence[Comparison],
    overall: Medians | None,
) -> dict[str, Any]:
    found = plain(overall) if overall is not None else {}
    names = ("n_questions", "n_known", "right_cached", "right_text", "empty_cached", "empty_text", "n_both_empty")
    return {
        **{name: found.get(name) for name in names},
        "factor": compressed.factor,
        "settings": memory.settings,
        "dtype": str(memory.backbone.dtype).removeprefix("torch."),
        "device": str(memory.backbone.device),
        "documents": [document.id for document in documents],
        "compressed": compressed,
        "questions": [_described(result) for result in results],
        "medians": overall,
    }


def _described(result: Comparison) -> dict[str, Any]:
    return {
        **plain(result),
        "ttft_ratio": result.ttft_ratio,
        "right_cached": result.is_right(result.caches),
        "right_text": result.is_right(result.text),
    }
